//! What a process has besides namespaces and identity: limits, priorities, where it may run.

use std::io::{ErrorKind, Write};

use libcontainer::process::memory_policy::setup_memory_policy;
use libcontainer::syscall::syscall::create_syscall;
use nix::sys::resource::{Resource, setrlimit};
use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimit, PosixRlimitType, Process,
    Scheduler, Spec,
};

use super::super::personality::Persona;
use super::super::users;
use super::super::workload::words;
use super::super::{Error, Result, chain};
use crate::sys::sched;

/// Where lmrun itself, and what it forks, is to run before it is in the container's cgroup.
pub(super) fn initial_affinity(process: &Process) -> Result<()> {
    let cpus = process.exec_cpu_affinity().as_ref().and_then(|affinity| affinity.initial().as_deref());
    set_affinity(cpus).map_err(Error::Init)
}

/// Sets all for the calling process, which is in the cgroup and not yet in the namespaces.
pub(super) fn set(spec: &Spec, process: &Process) -> std::result::Result<(), String> {
    if let Some(score) = process.oom_score_adj() {
        // /proc is still the host's.
        let file = std::fs::OpenOptions::new().write(true).open("/proc/self/oom_score_adj");
        match file.and_then(|mut file| file.write_all(score.to_string().as_bytes())) {
            // As create leaves it.
            Err(e) if e.kind() == ErrorKind::PermissionDenied && users::is_rootless() => {}
            written => written.map_err(|e| format!("set oom_score_adj: {e}"))?,
        }
    }
    for limit in process.rlimits().iter().flatten() {
        set_limit(limit).map_err(|e| format!("error setting rlimit type {}: {}", limit.typ(), words(e)))?;
    }
    if let Some(priority) = process.io_priority() {
        sched::set_io_priority(0, io_priority(priority)).map_err(|e| format!("set the I/O priority: {e}"))?;
    }
    if let Some(scheduler) = process.scheduler() {
        sched::set_attributes(0, attributes(scheduler)).map_err(|e| format!("set the scheduler: {e}"))?;
    }
    set_affinity(process.exec_cpu_affinity().as_ref().and_then(|affinity| affinity.cpu_affinity_final().as_deref()))?;
    if let Some(linux) = spec.linux() {
        setup_memory_policy(linux.memory_policy(), &*create_syscall())
            .map_err(|e| format!("set the memory policy: {}", chain(&e)))?;
    }
    Persona::of(spec).map_err(|e| e.to_string())?.map_or(Ok(()), Persona::assume)
}

fn set_affinity(cpus: Option<&str>) -> std::result::Result<(), String> {
    let Some(cpus) = cpus.filter(|cpus| !cpus.is_empty()) else {
        return Ok(());
    };
    let mask = cpu_mask(cpus).ok_or_else(|| format!("execCPUAffinity: {cpus:?} is no list of CPUs"))?;
    sched::set_affinity(0, &mask).map_err(|e| format!("set the CPU affinity to {cpus}: {e}"))
}

/// `0-3,7` as the kernel has it, one bit each.
fn cpu_mask(list: &str) -> Option<Vec<u8>> {
    let mut mask = vec![0_u8; 1024];
    for range in list.split(',').map(str::trim) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= mask.len() * 8 {
            return None;
        }
        (first..=last).for_each(|cpu| mask[cpu / 8] |= 1 << (cpu % 8));
    }
    Some(mask)
}

fn set_limit(limit: &PosixRlimit) -> nix::Result<()> {
    let resource = match limit.typ() {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    };
    setrlimit(resource, limit.soft(), limit.hard())
}

/// include/uapi/linux/ioprio.h: class and level in one word.
fn io_priority(wanted: &LinuxIOPriority) -> u32 {
    let class = match wanted.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    class << 13 | (wanted.priority() as u32 & 0x1fff)
}

/// include/uapi/linux/sched.h
fn attributes(wanted: &Scheduler) -> sched::Attributes {
    let policy = match wanted.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flag = |flag: &LinuxSchedulerFlag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    };
    sched::Attributes {
        policy,
        flags: wanted.flags().iter().flatten().map(flag).fold(0, |all, flag| all | flag),
        nice: wanted.nice().unwrap_or(0),
        priority: wanted.priority().unwrap_or(0).cast_unsigned(),
        runtime: wanted.runtime().unwrap_or(0),
        deadline: wanted.deadline().unwrap_or(0),
        period: wanted.period().unwrap_or(0),
        ..sched::Attributes::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus() {
        let mask = cpu_mask("0-3,9").unwrap();
        assert_eq!(mask[..2], [0x0f, 0x02]);
        for bad in ["", "a", "3-1", "1-", "99999"] {
            assert_eq!(cpu_mask(bad), None, "{bad}");
        }
    }
}
