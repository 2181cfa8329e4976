//! Compiled profiles, run on system calls by a small interpreter of classic BPF.

use super::*;

const EPERM: u32 = 0x0005_0001;

/// What the kernel shows a filter: number, architecture, arguments.
fn verdict(filter: &Filter, arch: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut data = vec![number, arch, 0, 0];
    data.extend(args.iter().flat_map(|arg| [*arg as u32, (*arg >> 32) as u32]));
    let (mut at, mut a) = (0, 0_u32);
    loop {
        let i = filter.program[at];
        at += 1;
        let holds = match i.code {
            LOAD_WORD => {
                a = data[i.k as usize / 4];
                continue;
            }
            0x54 => {
                a &= i.k;
                continue;
            }
            JUMP => {
                at += i.k as usize;
                continue;
            }
            RETURN => return i.k,
            JUMP_IF_EQUAL => a == i.k,
            0x25 => a > i.k,
            JUMP_IF_AT_LEAST => a >= i.k,
            code => panic!("instruction {code:#x}"),
        };
        at += usize::from(if holds { i.jt } else { i.jf });
    }
}

fn filter(profile: &str) -> Filter {
    Filter::compile(&serde_json::from_str(profile).unwrap()).unwrap()
}

fn call(filter: &Filter, name: &str, args: [u64; 6]) -> u32 {
    verdict(filter, AUDIT_ARCH_X86_64, numbers(Abi::X86_64)[name], args)
}

const PROFILE: &str = r#"{
    "defaultAction": "SCMP_ACT_ERRNO",
    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
    "syscalls": [
        {"names": ["read", "write", "exit", "no_such_call", "futex_waitv"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
        {"names": ["mmap"], "action": "SCMP_ACT_TRAP", "args": [
            {"index": 1, "value": 4294967296, "op": "SCMP_CMP_GE"}, {"index": 2, "value": 7, "op": "SCMP_CMP_EQ"}]},
        {"names": ["mmap"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["reboot"], "action": "SCMP_ACT_KILL_PROCESS"}
    ]}"#;

#[test]
fn actions_differ_by_rule() {
    let filter = filter(PROFILE);
    assert_eq!(call(&filter, "read", [0; 6]), ALLOW);
    assert_eq!(call(&filter, "open", [0; 6]), EPERM);
    assert_eq!(call(&filter, "clone3", [0; 6]), RET_ERRNO_ENOSYS);
    assert_eq!(call(&filter, "reboot", [0; 6]), 0x8000_0000);
}

#[test]
fn the_same_argument_twice_is_either_and_different_ones_are_both() {
    let filter = filter(PROFILE);
    let personality = |value| call(&filter, "personality", [value, 0, 0, 0, 0, 0]);
    assert_eq!((personality(0), personality(8), personality(1)), (ALLOW, ALLOW, EPERM));
    let mmap = |length, protection| call(&filter, "mmap", [0, length, protection, 0, 0, 0]);
    assert_eq!(mmap(1 << 32, 7), 0x0003_0000);
    assert_eq!((mmap(1, 7), mmap(1 << 32, 3)), (ALLOW, ALLOW));
}

#[test]
fn a_mask_is_the_value_and_what_is_left_the_second() {
    let filter = filter(PROFILE);
    let clone = |flags| call(&filter, "clone", [flags, 0, 0, 0, 0, 0]);
    assert_eq!(clone(0x0000_0011), ALLOW);
    assert_eq!(clone(0x1000_0011), EPERM, "a new user namespace");
}

#[test]
fn other_ways_into_the_kernel() {
    let filter = filter(PROFILE);
    let i386 = |name| verdict(&filter, AUDIT_ARCH_I386, numbers(Abi::I386)[name], [0; 6]);
    assert_eq!((i386("read"), i386("open")), (ALLOW, EPERM));
    let x32 = |number| verdict(&filter, AUDIT_ARCH_X86_64, X32_BIT | number, [0; 6]);
    assert_eq!(x32(0), RET_KILL_THREAD, "x32 is not in the profile");
    assert_eq!(verdict(&filter, 0xC000_00B7, 0, [0; 6]), RET_KILL_THREAD, "aarch64");
    assert_eq!(verdict(&filter, AUDIT_ARCH_X86_64, SKIPPED, [0; 6]), EPERM, "a call that a tracer skips");
}

#[test]
fn x32_is_numbered_apart() {
    let with_x32 = PROFILE.replace("SCMP_ARCH_X86\"", "SCMP_ARCH_X32\"");
    let filter = filter(&with_x32);
    let x32 = |number| verdict(&filter, AUDIT_ARCH_X86_64, X32_BIT | number, [0; 6]);
    assert_eq!((x32(1), x32(2)), (ALLOW, EPERM));
    assert_eq!(verdict(&filter, AUDIT_ARCH_I386, 4, [0; 6]), RET_KILL_THREAD);
}

#[test]
fn calls_newer_than_the_profile_do_not_exist() {
    let filter = filter(PROFILE);
    assert_eq!(call(&filter, "futex_waitv", [0; 6]), ALLOW);
    assert_eq!(call(&filter, "mseal", [0; 6]), RET_ERRNO_ENOSYS);
    let denying = self::filter(
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["reboot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]}"#,
    );
    assert_eq!(call(&denying, "mseal", [0; 6]), ALLOW);
    assert_eq!(call(&denying, "reboot", [0; 6]), 0x0005_000d);
}

#[test]
fn an_empty_profile_is_its_default() {
    let filter = filter(r#"{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 99}"#);
    assert_eq!(call(&filter, "read", [0; 6]), 0x0005_0063);
}

#[test]
fn what_cannot_be_done_is_refused() {
    let refused = |profile: &str| Filter::compile(&serde_json::from_str(profile).unwrap()).unwrap_err();
    let notify =
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]}"#;
    assert!(matches!(refused(notify), Error::Seccomp(_)));
    let seventh = r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_ALLOW",
        "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}"#;
    assert!(matches!(refused(seventh), Error::Seccomp(_)));
}
