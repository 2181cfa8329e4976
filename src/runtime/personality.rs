//! `linux.personality`: the execution domain and its flags.
//!
//! The runtime specification has a member for flags and defines none; here they have the kernel's names. libcontainer
//! refuses all of them, so it gets no personality at all.

use oci_spec::runtime::{LinuxPersonalityDomain, Spec};

use super::workload::words;
use super::{Error, Result};
use crate::sys::personality;

/// include/uapi/linux/personality.h
const FLAGS: [(&str, u32); 11] = [
    ("UNAME26", 0x002_0000),
    ("ADDR_NO_RANDOMIZE", 0x004_0000),
    ("FDPIC_FUNCPTRS", 0x008_0000),
    ("MMAP_PAGE_ZERO", 0x010_0000),
    ("ADDR_COMPAT_LAYOUT", 0x020_0000),
    ("READ_IMPLIES_EXEC", 0x040_0000),
    ("ADDR_LIMIT_32BIT", 0x080_0000),
    ("SHORT_INODE", 0x100_0000),
    ("WHOLE_SECONDS", 0x200_0000),
    ("STICKY_TIMEOUTS", 0x400_0000),
    ("ADDR_LIMIT_3GB", 0x800_0000),
];

/// What personality(2) is to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Persona(u32);

impl Persona {
    /// None where config.json says nothing.
    ///
    /// # Errors
    /// A flag that no kernel has.
    pub fn of(spec: &Spec) -> Result<Option<Self>> {
        let Some(wanted) = spec.linux().as_ref().and_then(|linux| linux.personality().as_ref()) else {
            return Ok(None);
        };
        let domain = match wanted.domain() {
            LinuxPersonalityDomain::PerLinux => 0,
            LinuxPersonalityDomain::PerLinux32 => 8,
        };
        wanted
            .flags()
            .iter()
            .flatten()
            .try_fold(domain, |all, name| flag(name).map(|flag| all | flag))
            .map(Persona)
            .map(Some)
    }

    /// Makes it the calling process's own, and that of what it executes.
    pub fn assume(self) -> std::result::Result<(), String> {
        personality::set(self.0).map_err(|e| format!("set the personality: {}", words(e)))
    }
}

fn flag(name: &str) -> Result<u32> {
    let known = FLAGS.iter().find(|(known, _)| *known == name).map(|(_, flag)| *flag);
    known.ok_or_else(|| Error::Config(format!("linux.personality: there is no flag {name:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(personality: &str) -> Result<Option<Persona>> {
        let json = format!(r#"{{"ociVersion": "1.3.0", "linux": {{"personality": {personality}}}}}"#);
        Persona::of(&serde_json::from_str(&json).unwrap())
    }

    #[test]
    fn domain_and_flags_are_one_number() {
        let flags = r#"{"domain": "LINUX32", "flags": ["ADDR_NO_RANDOMIZE", "UNAME26"]}"#;
        assert_eq!(of(flags).unwrap(), Some(Persona(0x006_0008)));
        assert_eq!(of(r#"{"domain": "LINUX"}"#).unwrap(), Some(Persona(0)));
        assert!(of(r#"{"domain": "LINUX", "flags": ["BOGUS"]}"#).unwrap_err().to_string().contains("BOGUS"));
    }
}
