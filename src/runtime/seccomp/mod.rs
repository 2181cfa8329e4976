//! The seccomp profile of config.json as one BPF program.
//!
//! Per architecture, runs of consecutive system calls that share a fate are found by binary search: Docker's
//! profile takes some 10 instructions per call and 500 in all. Conditions on arguments are compiled by
//! `seccompiler`, which by itself knows one architecture and two actions per program.
//!
//! The meaning is libseccomp's, under which profiles are written: a rule without conditions
//! comes last among those for a call, and the first such holds, a rule that does what the default does is void, names that an architecture
//! does not have are skipped, and foreign architectures are killed. As under runc, a call newer than all
//! that the profile names does not exist (ENOSYS), so that libraries fall back.

use std::os::fd::OwnedFd;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator, LinuxSyscall,
};
use seccompiler::{BpfProgram, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::{Error, Result};
use crate::sys::seccomp::{Instruction, MAX_INSTRUCTIONS, install, install_with_listener};

mod notify;
mod numbers;
#[cfg(test)]
mod tests;

pub use notify::{Agent, Listener};
use numbers::{Abi, numbers};

// linux/bpf_common.h: class | size or operation | mode or source.
const LOAD_WORD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

// linux/seccomp.h, struct seccomp_data.
const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;

// linux/audit.h
const AUDIT_ARCH_X86_64: u32 = 0xC000_003E;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
/// asm/unistd.h: set in the number of an x32 call.
const X32_BIT: u32 = 0x4000_0000;

/// What a tracer makes of a call that is to be skipped; it looks like one of x32.
const SKIPPED: u32 = u32::MAX;

const RET_KILL_THREAD: u32 = 0;
const RET_ERRNO_ENOSYS: u32 = 0x0005_0000 | nix::libc::ENOSYS as u32;

/// A compiled profile.
#[derive(Clone, Debug)]
pub struct Filter {
    program: Vec<Instruction>,
    flags: u64,
    /// Who answers where the profile says SCMP_ACT_NOTIFY.
    pub listener: Option<Listener>,
}

impl Filter {
    /// # Errors
    /// [`Error::Seccomp`] for what the profile asks for and lmrun cannot do.
    pub fn compile(profile: &LinuxSeccomp) -> Result<Self> {
        let rules = profile.syscalls().as_deref().unwrap_or_default();
        let default = profile.default_action().as_u32(profile.default_errno_ret());
        let listener = listener(profile, rules)?;
        let given = |arch| profile.architectures().iter().flatten().any(|given| *given == arch);
        let block = |abi, given: bool| {
            if given { calls(abi, default, rules) } else { Ok(vec![ret(RET_KILL_THREAD)]) }
        };
        let long = block(Abi::X86_64, true)?;
        let x32 = block(Abi::X32, given(Arch::ScmpArchX32))?;
        let i386 = block(Abi::I386, given(Arch::ScmpArchX86))?;

        let mut native = vec![load(OFFSET_NR)];
        let skips = |killing| branch(JUMP_IF_EQUAL, SKIPPED, vec![ret(default)], killing);
        let x32 = if given(Arch::ScmpArchX32) { x32 } else { skips(x32) };
        native.extend(branch(JUMP_IF_AT_LEAST, X32_BIT, x32, long));
        let mut compat = vec![load(OFFSET_NR)];
        compat.extend(i386);
        let foreign = branch(JUMP_IF_EQUAL, AUDIT_ARCH_I386, compat, vec![ret(RET_KILL_THREAD)]);
        let mut program = vec![load(OFFSET_ARCH)];
        program.extend(branch(JUMP_IF_EQUAL, AUDIT_ARCH_X86_64, native, foreign));
        if program.len() > MAX_INSTRUCTIONS {
            return Err(Error::Seccomp(format!(
                "the profile takes {} instructions, more than the kernel's {MAX_INSTRUCTIONS}",
                program.len()
            )));
        }
        let flags = flags(profile, listener.is_some());
        Ok(Filter { program, flags, listener })
    }

    /// Binds the calling thread, which needs no_new_privs or CAP_SYS_ADMIN.
    pub fn install(&self) -> nix::Result<()> {
        install(&self.program, self.flags)
    }

    /// As [`install`](Self::install), for a filter with a listener: the descriptor is that on which the kernel asks.
    pub fn install_with_listener(&self) -> nix::Result<OwnedFd> {
        install_with_listener(&self.program, self.flags)
    }
}

/// Where the agent is, if the profile needs one.
fn listener(profile: &LinuxSeccomp, rules: &[LinuxSyscall]) -> Result<Option<Listener>> {
    let refused = |why: &str| Err(Error::Seccomp(format!("SCMP_ACT_NOTIFY {why}")));
    if profile.default_action() == LinuxSeccompAction::ScmpActNotify {
        return refused("cannot be the default action");
    }
    if !rules.iter().any(|rule| rule.action() == LinuxSeccompAction::ScmpActNotify) {
        return Ok(None);
    }
    match profile.listener_path() {
        None => refused("needs a listenerPath"),
        Some(path) => {
            let metadata = profile.listener_metadata().clone().unwrap_or_default();
            Ok(Some(Listener { path: path.clone(), metadata }))
        }
    }
}

/// What happens to one system call.
#[derive(Clone, PartialEq)]
enum Fate {
    Always(u32),
    /// Rules on the arguments in order, each with what it returns; then the rest.
    Depends(Vec<(Vec<Instruction>, u32)>, u32),
}

/// The program for one architecture, the call's number being loaded.
fn calls(abi: Abi, default: u32, rules: &[LinuxSyscall]) -> Result<Vec<Instruction>> {
    let known = numbers(abi);
    let mut named = std::collections::BTreeMap::<u32, Fate>::new();
    let mut newest = 0;
    for rule in rules {
        let action = rule.action().as_u32(rule.errno_ret());
        let tests = conditions(abi, rule.args().as_deref().unwrap_or_default())?;
        for number in rule.names().iter().filter_map(|name| known.get(name.as_str())) {
            newest = newest.max(*number);
            if action == default {
                continue;
            }
            let fate = named.entry(*number).or_insert(Fate::Always(default));
            match (&mut *fate, tests.is_empty()) {
                // The first rule without conditions holds: libseccomp takes no second one.
                (Fate::Always(rest) | Fate::Depends(_, rest), true) if *rest == default => *rest = action,
                (_, true) => {}
                (Fate::Always(rest), false) => {
                    *fate = Fate::Depends(tests.iter().map(|test| (test.clone(), action)).collect(), *rest);
                }
                (Fate::Depends(all, _), false) => all.extend(tests.iter().map(|test| (test.clone(), action))),
            }
        }
    }
    let refuses = !matches!(default, ALLOW | LOG);
    let mut runs: Vec<(u32, Fate)> = Vec::new();
    for number in 0..=newest {
        let fate = named.remove(&number).unwrap_or(Fate::Always(default));
        if runs.last().is_none_or(|(_, last)| *last != fate) {
            runs.push((number, fate));
        }
    }
    let beyond = if refuses && newest > 0 { RET_ERRNO_ENOSYS } else { default };
    runs.push((newest + 1, Fate::Always(beyond)));
    if abi == Abi::X32 {
        runs.iter_mut().skip(1).for_each(|(number, _)| *number |= X32_BIT);
    }
    Ok(search(&runs))
}

const ALLOW: u32 = 0x7fff_0000;
const LOG: u32 = 0x7ffc_0000;

/// Finds the run that the loaded number is in, by halving.
fn search(runs: &[(u32, Fate)]) -> Vec<Instruction> {
    match runs {
        [] => vec![],
        [(_, Fate::Always(action))] => vec![ret(*action)],
        [(_, Fate::Depends(tests, rest))] => {
            let mut code = Vec::new();
            for (test, action) in tests {
                code.extend(test);
                code.push(ret(*action));
            }
            code.push(ret(*rest));
            code
        }
        _ => {
            let (low, high) = runs.split_at(runs.len() / 2);
            branch(JUMP_IF_AT_LEAST, high[0].0, search(high), search(low))
        }
    }
}

/// `then` where the comparison with `k` holds, else `otherwise`. Conditional jumps reach 255 instructions.
fn branch(jump: u16, k: u32, then: Vec<Instruction>, otherwise: Vec<Instruction>) -> Vec<Instruction> {
    let mut code = match u8::try_from(otherwise.len()) {
        Ok(skip) => vec![Instruction { code: jump, jt: skip, jf: 0, k }],
        Err(_) => vec![
            Instruction { code: jump, jt: 0, jf: 1, k },
            Instruction { code: JUMP, jt: 0, jf: 0, k: otherwise.len() as u32 },
        ],
    };
    code.extend(otherwise);
    code.extend(then);
    code
}

/// One piece of code per alternative: it runs on into the instruction behind it when its conditions hold, and skips that
/// when they do not. Conditions on the same argument are alternatives, as in runc; others must all hold.
fn conditions(abi: Abi, args: &[LinuxSeccompArg]) -> Result<Vec<Vec<Instruction>>> {
    if args.is_empty() {
        return Ok(vec![]);
    }
    let mut indices: Vec<_> = args.iter().map(LinuxSeccompArg::index).collect();
    indices.sort_unstable();
    let repeated = indices.windows(2).any(|pair| pair[0] == pair[1]);
    let alternatives = if repeated { args.chunks(1).collect() } else { vec![args] };
    alternatives.into_iter().map(|all| test(abi, all)).collect()
}

fn test(abi: Abi, args: &[LinuxSeccompArg]) -> Result<Vec<Instruction>> {
    // libseccomp takes x32 for an architecture of 32 bits, and looks at no more.
    let width = if abi == Abi::X86_64 { SeccompCmpArgLen::Qword } else { SeccompCmpArgLen::Dword };
    let conditions = args.iter().map(|arg| {
        let (operator, value) = match arg.op() {
            LinuxSeccompOperator::ScmpCmpNe => (SeccompCmpOp::Ne, arg.value()),
            LinuxSeccompOperator::ScmpCmpLt => (SeccompCmpOp::Lt, arg.value()),
            LinuxSeccompOperator::ScmpCmpLe => (SeccompCmpOp::Le, arg.value()),
            LinuxSeccompOperator::ScmpCmpEq => (SeccompCmpOp::Eq, arg.value()),
            LinuxSeccompOperator::ScmpCmpGe => (SeccompCmpOp::Ge, arg.value()),
            LinuxSeccompOperator::ScmpCmpGt => (SeccompCmpOp::Gt, arg.value()),
            // The runtime specification's `value` is the mask here, and `valueTwo` what must be left.
            LinuxSeccompOperator::ScmpCmpMaskedEq => {
                (SeccompCmpOp::MaskedEq(arg.value()), arg.value_two().unwrap_or(0))
            }
        };
        let index = u8::try_from(arg.index()).unwrap_or(u8::MAX);
        SeccompCondition::new(index, width.clone(), operator, value)
    });
    let rule = conditions.collect::<std::result::Result<Vec<_>, _>>().and_then(SeccompRule::new);
    let code: BpfProgram = rule.map_err(|e| Error::Seccomp(e.to_string()))?.into();
    Ok(code.into_iter().map(|i| Instruction { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect())
}

/// linux/seccomp.h. Where the profile says nothing, speculation is left to the CPU, as under runc.
fn flags(profile: &LinuxSeccomp, listens: bool) -> u64 {
    const SPEC_ALLOW: u64 = 1 << 2;
    let bit = |flag: &LinuxSeccompFilterFlag| match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => 1 << 1,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => SPEC_ALLOW,
        // Means nothing, and is refused by the kernel, without a listener.
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv if listens => 1 << 5,
        // TSYNC: there is one thread.
        _ => 0,
    };
    profile.flags().as_ref().map_or(SPEC_ALLOW, |flags| flags.iter().map(bit).fold(0, |all, bit| all | bit))
}

fn load(offset: u32) -> Instruction {
    Instruction { code: LOAD_WORD, jt: 0, jf: 0, k: offset }
}

fn ret(action: u32) -> Instruction {
    Instruction { code: RETURN, jt: 0, jf: 0, k: action }
}
