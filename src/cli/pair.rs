//! `lmrun pair`: hosts that get to know each other.

use super::report::Failure;
use crate::migrate::pairing::{self, Invitation};
use crate::transfer::pki::{self, Peer, Pki};

/// Make this host and another one known to each other, so that containers can move between them
///
/// Say `lmrun pair --listen` at one of the two hosts, and at the other one the command that it prints. Between hosts that
/// have ssh, `lmrun pair ssh://root@HOST` is all. This host's key, and what it knows of others, are in /etc/lmrun/pki, or where
/// the variable LMRUN_PKI says.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("way").required(true))]
pub struct Args {
    /// HOST:PORT of the host that waits, or ssh://[USER@]HOST
    #[arg(group = "way", value_name = "HOST")]
    host: Option<String>,
    /// The code that the other host has printed
    #[arg(requires = "host")]
    code: Option<String>,
    /// Wait for the other host at this HOST:PORT, by default at port 7678 of all addresses
    #[arg(long, group = "way", value_name = "HOST:PORT", num_args = 0..=1)]
    listen: Option<Option<String>>,
    /// The other end of ssh
    #[arg(long, group = "way", hide = true)]
    stdio: bool,
    /// Show this host and those that it knows
    #[arg(long, group = "way")]
    list: bool,
    /// Know a host no more
    #[arg(long, group = "way", value_name = "NAME")]
    forget: Option<String>,
    /// What this host is called at the other, by default its own name
    #[arg(long)]
    name: Option<String>,
}

impl Args {
    pub fn run(&self) -> Result<u8, Failure> {
        let pki = Pki::default();
        let name = self.name.clone().unwrap_or_else(pki::host_name);
        match (&self.host, &self.listen, &self.forget) {
            (Some(host), ..) => {
                let failed = |e| Failure::new(format!("cannot pair with {host}"), e);
                let peer = match &self.code {
                    None if host.starts_with("ssh://") => pairing::over_ssh(host, &pki, &name),
                    None => return Err(Failure::new(format!("cannot pair with {host}"), NO_CODE)),
                    Some(code) => pairing::join(host, code, &pki, &name),
                };
                tell(&peer.map_err(failed)?);
            }
            (_, Some(listen), _) => wait(listen.as_deref(), pki, &name).map_err(|e| Failure::new("cannot pair", e))?,
            (_, _, Some(peer)) => {
                pki.forget(peer).map_err(|e| Failure::new(format!("cannot forget {peer}"), e))?;
            }
            _ if self.stdio => {
                let (input, output) = (std::io::stdin().lock(), std::io::stdout().lock());
                pairing::over_stdio(&pki, &name, input, output).map_err(|e| Failure::new("cannot pair", e))?;
            }
            _ => list(&pki, &name).map_err(|e| Failure::new("cannot list hosts", e))?,
        }
        Ok(0)
    }
}

const NO_CODE: &str = "the code is missing; hint: `lmrun pair --listen` at the other host prints it; or use ssh://";

fn wait(listen: Option<&str>, pki: Pki, name: &str) -> pairing::Result<()> {
    let invitation = Invitation::open(listen, pki, name)?;
    let address = invitation.address().map_err(pairing::Error::Wait)?;
    let host = if address.ip().is_unspecified() { format!("{name}:{}", address.port()) } else { address.to_string() };
    println!("At the other host, within {} minutes, say:", pairing::PATIENCE.as_secs() / 60);
    println!("    lmrun pair {host} {}", invitation.code());
    tell(&invitation.wait(pairing::PATIENCE)?);
    Ok(())
}

fn tell(peer: &Peer) {
    println!("paired with {} ({}): containers can move both ways", peer.name, peer.fingerprint);
}

fn list(pki: &Pki, name: &str) -> pki::Result<()> {
    let own = Peer { name: format!("{name} (this host)"), fingerprint: pki.identity()?.fingerprint() };
    for peer in std::iter::once(own).chain(pki.peers()?) {
        println!("{:24} {}", peer.name, peer.fingerprint);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use clap::Parser;

    #[test]
    fn the_ways_exclude_each_other() {
        let parsed = |line: &str| Cli::try_parse_from(line.split(' '));
        for good in [
            "lmrun pair --listen",
            "lmrun pair --listen [::1]:9",
            "lmrun pair h:9 code",
            "lmrun pair ssh://h",
            "lmrun pair --list",
        ] {
            assert!(matches!(parsed(good).unwrap().command, Command::Pair(_)), "{good}");
        }
        for bad in
            ["lmrun pair", "lmrun pair --list h:9", "lmrun pair --listen --list", "lmrun pair h:9 code --forget x"]
        {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}
