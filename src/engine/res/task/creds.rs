//! Credentials (credentials(7), capabilities(7)): of a thread, as in the kernel.

use crate::engine::{Error, Result};
use crate::image::records::task::CredsEntry;
use crate::sys::proc;
use crate::tracee::batch::Batch;

const SECBIT_NO_SETUID_FIXUP: u64 = 1 << 2;
const LAST_POSSIBLE_CAP: u64 = 63;
/// _LINUX_CAPABILITY_VERSION_3
const CAP_VERSION: u32 = 0x2008_0522;
const PR_CAP_AMBIENT_RAISE: u64 = 2;

/// Asks for what /proc does not show: the securebits.
pub fn ask(b: &mut Batch) -> usize {
    let zero = 0u64;
    b.call("prctl(PR_GET_SECUREBITS)", libc::SYS_prctl, [libc::PR_GET_SECUREBITS.into(), zero.into(), zero.into()])
}

/// The record of the thread whose `/proc` status is `status`.
pub fn answer(asked: usize, status: &proc::Status, b: &Batch) -> std::io::Result<CredsEntry> {
    record(status, b.result(asked) as u32)
}

/// As [`answer`], for who cannot be asked: a zombie.
pub fn record(status: &proc::Status, secbits: u32) -> std::io::Result<CredsEntry> {
    let id = |name| -> std::io::Result<[u32; 4]> {
        let ids: Vec<u32> = status.numbers(name, 10)?.into_iter().map(|n| n as u32).collect();
        ids.try_into().map_err(|_| std::io::ErrorKind::InvalidData.into())
    };
    let ([uid, euid, suid, fsuid], [gid, egid, sgid, fsgid]) = (id("Uid")?, id("Gid")?);
    let caps = |name| status.mask(name).map(words);
    Ok(CredsEntry {
        uid,
        gid,
        euid,
        egid,
        suid,
        sgid,
        fsuid,
        fsgid,
        cap_inh: caps("CapInh")?,
        cap_prm: caps("CapPrm")?,
        cap_eff: caps("CapEff")?,
        cap_bnd: caps("CapBnd")?,
        secbits,
        groups: status.numbers("Groups", 10)?.into_iter().map(|g| g as u32).collect(),
        lsm_profile: None,
        lsm_sockcreate: None,
        apparmor_data: None,
        no_new_privs: Some(status.number("NoNewPrivs")?),
        cap_amb: caps("CapAmb")?,
    })
}

fn words(mask: u64) -> Vec<u32> {
    vec![mask as u32, (mask >> 32) as u32]
}

fn mask(words: &[u32]) -> u64 {
    u64::from(words.first().copied().unwrap_or(0)) | u64::from(words.get(1).copied().unwrap_or(0)) << 32
}

/// Gives a puppet's thread the credentials. `has`: the capabilities that puppets have. The order is that of
/// what each step needs: uids need CAP_SETUID, the bounding set and securebits CAP_SETPCAP, ambient
/// capabilities need permitted and inheritable ones.
pub fn apply(e: &CredsEntry, has: u64, tid: u32, b: &mut Batch) -> Result<()> {
    let (inheritable, permitted, effective) = (mask(&e.cap_inh), mask(&e.cap_prm), mask(&e.cap_eff));
    let lacking = permitted & !has;
    if lacking != 0 {
        let what = format!("task {tid} of the checkpoint has capabilities that lmrun has not (mask {lacking:#x})");
        return Err(Error::System { what, source: std::io::Error::from_raw_os_error(libc::EPERM) });
    }
    let prctl = |b: &mut Batch, name, option: i32, x: u64, y: u64| {
        b.call(name, libc::SYS_prctl, [option.into(), x.into(), y.into(), 0.into(), 0.into()])
    };
    prctl(b, "prctl(PR_SET_SECUREBITS)", libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0);
    let groups: Vec<u8> = e.groups.iter().flat_map(|g| g.to_ne_bytes()).collect();
    let at = b.bytes(&groups);
    b.call("setgroups", libc::SYS_setgroups, [e.groups.len().into(), at.into()]);
    b.call("setresgid", libc::SYS_setresgid, [e.gid.into(), e.egid.into(), e.sgid.into()]);
    b.call("setfsgid", libc::SYS_setfsgid, [e.fsgid.into()]);
    b.call("setresuid", libc::SYS_setresuid, [e.uid.into(), e.euid.into(), e.suid.into()]);
    b.call("setfsuid", libc::SYS_setfsuid, [e.fsuid.into()]);
    capset(b, has, has, inheritable);
    for cap in bits(mask(&e.cap_amb)) {
        prctl(b, "prctl(PR_CAP_AMBIENT)", libc::PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap);
    }
    // Dropping what is not there is no error; asking for a number that the kernel does not know is.
    for cap in bits(has & !mask(&e.cap_bnd)) {
        prctl(b, "prctl(PR_CAPBSET_DROP)", libc::PR_CAPBSET_DROP, cap, 0);
    }
    if e.no_new_privs == Some(1) {
        prctl(b, "prctl(PR_SET_NO_NEW_PRIVS)", libc::PR_SET_NO_NEW_PRIVS, 1, 0);
    }
    prctl(b, "prctl(PR_SET_SECUREBITS)", libc::PR_SET_SECUREBITS, u64::from(e.secbits), 0);
    capset(b, effective, permitted, inheritable);
    Ok(())
}

fn bits(mask: u64) -> impl Iterator<Item = u64> {
    (0..=LAST_POSSIBLE_CAP).filter(move |c| mask & (1 << c) != 0)
}

fn capset(b: &mut Batch, effective: u64, permitted: u64, inheritable: u64) {
    let header = b.bytes(&[CAP_VERSION.to_ne_bytes(), 0u32.to_ne_bytes()].concat());
    let half = |shift: u32| [effective, permitted, inheritable].map(|m| ((m >> shift) as u32).to_ne_bytes()).concat();
    let data = b.bytes(&[half(0), half(32)].concat());
    b.call("capset", libc::SYS_capset, [header.into(), data.into()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_words_are_little_end_first() {
        assert_eq!(words(0x1ff_feff_ffff), [0xfeff_ffff, 0x1ff]);
        assert_eq!(mask(&words(0x1ff_feff_ffff)), 0x1ff_feff_ffff);
        assert_eq!(bits(0b1010).collect::<Vec<_>>(), [1, 3]);
    }
}
