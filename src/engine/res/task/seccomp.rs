//! Seccomp filters. A chain that several threads have is recorded once.

use libc::pid_t;

use crate::engine::{Error, Result, Why};
use crate::image::records::core::{SeccompMode, ThreadCoreEntry};
use crate::image::records::task::{SeccompEntry, SeccompFilter};
use crate::sys::ptrace;
use crate::tracee::batch::Batch;

const SECCOMP_SET_MODE_FILTER: u64 = 1;

/// Reads a thread's filters into `all`, each chained by `prev` to the one that was installed before it.
pub fn collect(tid: pid_t, mode: u32, core: &mut ThreadCoreEntry, all: &mut SeccompEntry) -> Result<()> {
    core.seccomp_mode = Some(mode as i32);
    if mode == SeccompMode::Strict as u32 {
        return Err(Error::refused(tid, Why::StrictSeccomp));
    }
    if mode == SeccompMode::Disabled as u32 {
        return Ok(());
    }
    let mut prev = None;
    for f in ptrace::seccomp_filters(tid).map_err(|e| Error::proc(tid, e))? {
        let record = SeccompFilter { filter: f.program, prev, flags: Some(f.flags) };
        let index = all.seccomp_filters.iter().position(|known| *known == record).unwrap_or_else(|| {
            all.seccomp_filters.push(record);
            all.seccomp_filters.len() - 1
        });
        prev = Some(index as u32);
    }
    core.seccomp_filter = prev;
    Ok(())
}

/// The filters of a thread, the oldest first. None: the image names one that it does not have.
pub fn chain<'a>(core: &ThreadCoreEntry, all: &'a SeccompEntry) -> Option<Vec<&'a SeccompFilter>> {
    let mut chain = Vec::new();
    let mut next = core.seccomp_filter.filter(|_| core.seccomp_mode == Some(SeccompMode::Filter as i32));
    while let Some(index) = next {
        let f = all.seccomp_filters.get(index as usize)?;
        if chain.len() > all.seccomp_filters.len() {
            return None;
        }
        chain.push(f);
        next = f.prev;
    }
    chain.reverse();
    Some(chain)
}

/// Installs the chain in the calling thread. Filters do not run while it is traced with SUSPEND_SECCOMP.
pub fn apply(chain: &[&SeccompFilter], b: &mut Batch) {
    for f in chain {
        let program = b.bytes(&f.filter);
        // struct sock_fprog: u16 length, pointer at 8
        let count = (f.filter.len() / 8) as u64;
        let fprog = b.bytes(&[count.to_ne_bytes(), program.to_ne_bytes()].concat());
        let flags = u64::from(f.flags.unwrap_or(0));
        b.call("seccomp", libc::SYS_seccomp, [SECCOMP_SET_MODE_FILTER.into(), flags.into(), fprog.into()]);
    }
}
