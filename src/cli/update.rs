//! `lmrun update`

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use oci_spec::runtime::LinuxResources;
use serde_json::{Value, json};

use super::report::Failure;
use crate::runtime::{self, Schemata, Store};

/// Change the limits of a running container; what is 0 or not given stays
#[derive(Debug, clap::Args)]
pub struct Args {
    /// File with `resources` as config.json has them, or - for standard input; other options do not count then
    #[arg(short, long, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// 10 to 1000
    #[arg(long, value_name = "WEIGHT")]
    blkio_weight: Option<u16>,
    /// Microseconds
    #[arg(long, value_name = "TIME")]
    cpu_period: Option<u64>,
    /// Microseconds in each period; -1: no limit
    #[arg(long, value_name = "TIME", allow_negative_numbers = true)]
    cpu_quota: Option<i64>,
    /// Microseconds
    #[arg(long, value_name = "TIME")]
    cpu_burst: Option<u64>,
    #[arg(long, visible_alias = "cpu-shares", value_name = "SHARES")]
    cpu_share: Option<u64>,
    /// Microseconds
    #[arg(long, value_name = "TIME")]
    cpu_rt_period: Option<u64>,
    /// Microseconds
    #[arg(long, value_name = "TIME", allow_negative_numbers = true)]
    cpu_rt_runtime: Option<i64>,
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// 1: run only when nobody else wants to
    #[arg(long, value_name = "0|1")]
    cpu_idle: Option<i64>,
    /// Bytes, or with k, m, g; -1: no limit
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    memory: Option<String>,
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    memory_reservation: Option<String>,
    /// Memory and swap together
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    memory_swap: Option<String>,
    /// Accepted: no kernel has this limit any more
    #[arg(long, value_name = "SIZE", hide = true)]
    kernel_memory: Option<String>,
    #[arg(long, value_name = "SIZE", hide = true)]
    kernel_memory_tcp: Option<String>,
    /// -1: no limit
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// Intel RDT
    #[arg(long, value_name = "LINE")]
    l3_cache_schema: Option<String>,
    /// Intel RDT
    #[arg(long, value_name = "LINE")]
    mem_bw_schema: Option<String>,
    /// The name of the container
    id: String,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("invalid value for {name}: invalid size: '{text}'")]
    Size { name: &'static str, text: String },
    #[error("{}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    #[error("resources: {0}")]
    Json(#[from] serde_json::Error),
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        let what = || format!("cannot update container {}", self.id);
        let resources = self.resources().map_err(|e| Failure::new(what(), e))?;
        let schemata = match self.resources {
            Some(_) => Schemata::default(),
            None => Schemata { l3_cache: self.l3_cache_schema.clone(), memory_bandwidth: self.mem_bw_schema.clone() },
        };
        runtime::update(store, &self.id, &resources, &schemata).map_err(|e| Failure::new(what(), e))?;
        Ok(0)
    }

    fn resources(&self) -> Result<LinuxResources, Error> {
        let Some(path) = &self.resources else {
            return Ok(serde_json::from_value(self.given()?)?);
        };
        let mut text = String::new();
        let read = if path.as_os_str() == "-" {
            io::stdin().read_to_string(&mut text)
        } else {
            File::open(path).and_then(|mut file| file.read_to_string(&mut text))
        };
        read.map_err(|e| Error::Read(path.clone(), e))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// The single values, in config.json's form.
    fn given(&self) -> Result<Value, Error> {
        let size = |name, text: &Option<String>| text.as_deref().map(|text| bytes(name, text)).transpose();
        let mut given = json!({
            "memory": {
                "limit": size("memory", &self.memory)?,
                "reservation": size("memory-reservation", &self.memory_reservation)?,
                "swap": size("memory-swap", &self.memory_swap)?,
            },
            "cpu": {
                "shares": self.cpu_share, "quota": self.cpu_quota, "period": self.cpu_period, "burst": self.cpu_burst,
                "realtimeRuntime": self.cpu_rt_runtime, "realtimePeriod": self.cpu_rt_period, "idle": self.cpu_idle,
                "cpus": self.cpuset_cpus, "mems": self.cpuset_mems,
            },
            "blockIO": { "weight": self.blkio_weight },
        });
        if let Some(limit) = self.pids_limit {
            given["pids"] = json!({ "limit": limit });
        }
        Ok(given)
    }
}

/// `64m` and the like, in powers of 1024.
fn bytes(name: &'static str, text: &str) -> Result<i64, Error> {
    let wrong = || Error::Size { name, text: text.to_owned() };
    let lower = text.trim().to_ascii_lowercase();
    let number = lower.trim_end_matches("ib").trim_end_matches('b');
    let unit = number.trim_start_matches(|c: char| c.is_ascii_digit() || "-.".contains(c));
    let exponent = match unit.trim() {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return Err(wrong()),
    };
    let number = number[..number.len() - unit.len()].trim();
    if let Ok(whole) = number.parse::<i64>() {
        return whole.checked_mul(1024_i64.pow(exponent)).ok_or_else(wrong);
    }
    let size: f64 = number.parse().map_err(|_| wrong())?;
    let size = size * 1024_f64.powi(exponent.cast_signed());
    // What does not fit is no size.
    if size.abs() < i64::MAX as f64 { Ok(size as i64) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::*;
    use clap::Parser;

    fn args(argv: &str) -> Args {
        let Command::Update(args) = Cli::try_parse_from(argv.split(' ')).unwrap().command else { panic!() };
        args
    }

    #[test]
    fn as_engines_call_it() {
        assert_eq!(args("lmrun update --resources - c").resources.unwrap().to_str(), Some("-"));
        assert_eq!(
            args("lmrun update --resources=/var/tmp/podman1 c").resources.unwrap().to_str(),
            Some("/var/tmp/podman1")
        );
    }

    #[test]
    fn every_single_value() {
        let given = args(
            "lmrun update --blkio-weight 10 --cpu-period 100 --cpu-quota -1 --cpu-burst 5 --cpu-share 7 --cpu-rt-period 1 \
             --cpu-rt-runtime 2 --cpuset-cpus 0-1 --cpuset-mems 0 --cpu-idle 1 --memory 32m --memory-reservation 1g \
             --memory-swap -1 --kernel-memory 1 --kernel-memory-tcp 1 --pids-limit 9 --l3-cache-schema L3:0=f \
             --mem-bw-schema MB:0=50 c",
        );
        let resources = given.resources().unwrap();
        let memory = resources.memory().unwrap();
        assert_eq!((memory.limit(), memory.reservation(), memory.swap()), (Some(32 << 20), Some(1 << 30), Some(-1)));
        assert_eq!(resources.cpu().as_ref().unwrap().quota(), Some(-1));
        assert_eq!(resources.pids().unwrap().limit(), 9);
    }

    #[test]
    fn sizes() {
        assert_eq!(bytes("memory", "1.5k").unwrap(), 1536);
        assert_eq!(bytes("memory", "2GiB").unwrap(), 2 << 30);
        assert_eq!(bytes("memory", "abc").unwrap_err().to_string(), "invalid value for memory: invalid size: 'abc'");
    }
}
