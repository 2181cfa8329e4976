//! The mappings of processes with their flags, without a walk through their page tables.
//!
//! Only `/proc/PID/smaps` says what a mapping's flags mean, and takes some 20 ms per GiB for it. The kernel's own `vm_flags` are read in
//! microseconds ([`VmaFlags`]); which of their bits means what is its affair. So what smaps says of a mapping is noted while the
//! container runs, and believed of every mapping with the same bits when it stands still.

use std::collections::HashMap;
use std::io;

use libc::pid_t;

use crate::sys::proc::{self, Vma};
use crate::sys::vma_flags::{RawVma, VmaFlags};

/// What the flags of a mapping are called.
type Names = Vec<[u8; 2]>;

/// What is known of flags. By default nothing, and all is read from smaps.
#[derive(Debug, Default)]
pub struct Mappings {
    raw: Option<VmaFlags>,
    names: HashMap<u64, Names>,
    /// Of `[vsyscall]`, which is a mapping of everybody's.
    gate: Option<Names>,
}

impl Mappings {
    /// Makes ready for [`Mappings::learn`], which takes some 10 ms.
    pub fn open() -> Mappings {
        let raw = VmaFlags::open().inspect_err(|error| tracing::debug!(%error, "mappings are read from smaps alone"));
        Mappings { raw: raw.ok(), ..Mappings::default() }
    }

    /// Notes what the flags of a process that runs are called.
    ///
    /// # Errors
    /// What the kernel says of the process.
    pub fn learn(&mut self, pid: pid_t) -> io::Result<()> {
        let Some(raw) = &self.raw else { return Ok(()) };
        let Ok(before) = raw.read(pid) else { return Ok(()) };
        if self.gate.is_some() && before.iter().all(|v| self.names.contains_key(&v.flags)) {
            return Ok(());
        }
        let smaps = proc::smaps(pid)?;
        // Only what did not change meanwhile.
        let after = by_start(raw.read(pid).unwrap_or_default());
        let before: Vec<RawVma> = before.into_iter().filter(|v| after.get(&v.start) == Some(v)).collect();
        self.note(by_start(before), &smaps);
        Ok(())
    }

    fn note(&mut self, raw: HashMap<u64, RawVma>, smaps: &[Vma]) {
        for vma in smaps {
            match raw.get(&vma.start) {
                Some(raw) if raw.end == vma.end => {
                    self.names.insert(raw.flags, vma.flags.clone());
                }
                _ if vma.name == b"[vsyscall]" => self.gate = Some(vma.flags.clone()),
                _ => {}
            }
        }
    }

    /// All mappings of a process that stands still, in ascending order, with their flags.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read(&mut self, pid: pid_t) -> io::Result<Vec<Vma>> {
        let Some(Ok(raw)) = self.raw.as_ref().map(|raw| raw.read(pid)) else { return proc::smaps(pid) };
        let raw = by_start(raw);
        let mut all = proc::maps(pid)?;
        for vma in &mut all {
            let names = match raw.get(&vma.start) {
                Some(raw) if raw.end == vma.end => self.names.get(&raw.flags),
                _ => self.gate.as_ref().filter(|_| vma.name == b"[vsyscall]"),
            };
            let Some(names) = names else {
                let all = proc::smaps(pid)?;
                self.note(raw, &all);
                return Ok(all);
            };
            vma.flags.clone_from(names);
        }
        Ok(all)
    }
}

fn by_start(all: Vec<RawVma>) -> HashMap<u64, RawVma> {
    all.into_iter().map(|vma| (vma.start, vma)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_learned_and_what_was_not_is_the_same() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id().cast_signed();
        let settled = || loop {
            let before = proc::smaps(pid).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(50));
            if proc::smaps(pid).unwrap() == before {
                return before;
            }
        };
        let truth = settled();
        let (mut taught, mut untaught, mut without) = (Mappings::open(), Mappings::open(), Mappings::default());
        taught.learn(pid).unwrap();
        without.learn(pid).unwrap();
        for mappings in [&mut taught, &mut untaught, &mut without] {
            for _ in 0..2 {
                assert_eq!(mappings.read(pid).unwrap(), truth);
            }
        }
        // In words that nobody could have read from smaps.
        if taught.raw.is_some() {
            taught.names.values_mut().for_each(|names| *names = vec![*b"??"]);
            assert!(taught.read(pid).unwrap().iter().filter(|v| v.name != b"[vsyscall]").all(|v| v.has(b"??")));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
