//! One profile, compiled by lmrun and by runc (with libseccomp), taken from running containers: the same verdict everywhere.
//! The profiles are those that Docker, containerd and Podman give their containers, read from such containers.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use lmrun::sys::ptrace;
use runtime_tests::bundle::Shape;
use runtime_tests::command;
use runtime_tests::container::Container;
use runtime_tests::{needs, profile};
use serde_json::Value;

/// An instruction of classic BPF: code, jumps, constant.
type Instruction = (u16, u8, u8, u32);

const LIMIT: Duration = Duration::from_secs(20);

/// What Debian 12's libseccomp knows, in a profile of every kind of rule.
#[test]
fn verdicts_are_runcs() {
    same_verdicts(profile::docker_like(448));
}

#[test]
fn verdicts_are_runcs_for_docker() {
    same_verdicts(serde_json::from_str(include_str!("../profiles/docker.json")).unwrap());
}

#[test]
fn verdicts_are_runcs_for_containerd() {
    same_verdicts(serde_json::from_str(include_str!("../profiles/containerd.json")).unwrap());
}

#[test]
fn verdicts_are_runcs_for_podman() {
    same_verdicts(serde_json::from_str(include_str!("../profiles/podman.json")).unwrap());
}

fn same_verdicts(profile: Value) {
    if !needs::root() {
        return;
    }
    let Some(runc) = needs::on_path("runc") else {
        return needs::skip("runc is not installed");
    };
    let compared = compared(&profile);
    let seccomp = Some(profile);
    let args = ["/workload", "load-memory", "1"].map(str::to_owned).to_vec();
    let c = Container::new(&Shape { args, seccomp, ..Shape::default() });
    let bundle = c.bundle();
    let runs = [c.lmrun(), {
        let mut command = Command::new(runc);
        command.arg("--root").arg(c.base.join("runc"));
        command
    }];
    let mut filters = Vec::new();
    for runtime in runs {
        let program = runtime.get_program().to_owned();
        let globals: Vec<_> = runtime.get_args().map(ToOwned::to_owned).collect();
        let perform = |words: &[&str], bundle: Option<&std::path::Path>| {
            let mut command = Command::new(&program);
            command.args(&globals).args(words);
            bundle.map(|bundle| command.arg("--bundle").arg(bundle));
            command::run(command.arg(&c.id), LIMIT)
        };
        perform(&["run", "-d"], Some(&bundle)).ok();
        let state: Value = serde_json::from_str(&perform(&["state"], None).ok().out).unwrap();
        let filter = filter_of(state["pid"].as_i64().unwrap() as i32);
        perform(&["delete", "--force"], None).ok();
        filters.push(filter);
    }
    let differences = differences(&filters[0], &filters[1], &compared);
    assert!(differences.is_empty(), "{} differ: {:#x?}", differences.len(), &differences[..differences.len().min(20)]);
}

/// The filter of a running process, which has one.
fn filter_of(pid: i32) -> Vec<Instruction> {
    ptrace::seize(pid, 0).unwrap();
    ptrace::interrupt(pid).unwrap();
    while ptrace::wait(pid, false).unwrap().is_none() {}
    let filters = ptrace::seccomp_filters(pid).unwrap();
    ptrace::detach(pid, 0).unwrap();
    assert_eq!(filters.len(), 1);
    let bytes = &filters[0].program;
    let instruction = |bytes: &[u8]| {
        let constant = u32::from_ne_bytes(bytes[4..8].try_into().unwrap());
        (u16::from_ne_bytes([bytes[0], bytes[1]]), bytes[2], bytes[3], constant)
    };
    bytes.chunks(8).map(instruction).collect()
}

/// Architecture, number, argument's place and value, both verdicts.
type Difference = (u32, u32, usize, u64, u32, u32);

/// The values that a profile compares arguments with, and those beside them, in either half of 64 bits.
fn compared(profile: &Value) -> BTreeSet<u64> {
    let rules = profile["syscalls"].as_array().into_iter().flatten();
    let args = rules.flat_map(|rule| rule["args"].as_array().into_iter().flatten());
    let named = args.flat_map(|arg| [arg["value"].as_u64(), arg["valueTwo"].as_u64()]).flatten();
    let mut all: BTreeSet<u64> = named
        .flat_map(|value| [value, value.wrapping_sub(1), value.wrapping_add(1), !value, value << 32, value | 1 << 32])
        .collect();
    all.extend([0, 1, 0xffff_fffe, 0xffff_ffff, 0x1_0000_0000, u64::MAX]);
    all.extend((0..64).map(|bit| 1_u64 << bit));
    all
}

/// Every call of every architecture, and numbers that no call has.
fn differences(ours: &[Instruction], theirs: &[Instruction], values: &BTreeSet<u64>) -> Vec<Difference> {
    const X32: u32 = 0x4000_0000;
    let (x86_64, i386, aarch64) = (0xC000_003E, 0x4000_0003, 0xC000_00B7);
    let mut differences = Vec::new();
    let mut compare = |arch, number, place, value| {
        let mut args = [0; 6];
        args[place] = value;
        let [ours, theirs] = [ours, theirs].map(|program| verdict(program, arch, number, args));
        if ours.0 != theirs.0 {
            differences.push((arch, number, place, value, ours.0, theirs.0));
        }
        ours.1 || theirs.1
    };
    let mut looked_at_arguments = 0;
    for (arch, base) in [(x86_64, 0), (x86_64, X32), (i386, 0), (i386, X32), (aarch64, 0), (x86_64, u32::MAX)] {
        for number in (0..1024).chain([0xffff, 0x3fff_ffff]).map(|n| base | n) {
            // A program that looks at no argument has one verdict for all.
            if !compare(arch, number, 0, 0) {
                continue;
            }
            looked_at_arguments += 1;
            for place in 0..6 {
                for value in values {
                    compare(arch, number, place, *value);
                }
            }
        }
    }
    assert!(looked_at_arguments > 2, "personality and clone, at least, have rules on their arguments");
    differences
}

/// What the kernel would make of one call, and whether it would look at an argument.
fn verdict(program: &[Instruction], arch: u32, number: u32, args: [u64; 6]) -> (u32, bool) {
    let mut data = vec![number, arch, 0, 0];
    data.extend(args.iter().flat_map(|arg| [*arg as u32, (*arg >> 32) as u32]));
    // struct seccomp_data: number, architecture, instruction pointer, arguments.
    let (mut at, mut a, mut looked) = (0, 0_u32, false);
    loop {
        let (code, yes, no, k) = program[at];
        at += 1;
        let holds = match code {
            0x20 => {
                a = data[k as usize / 4];
                looked |= k >= 16;
                continue;
            }
            0x54 => {
                a &= k;
                continue;
            }
            0x05 => {
                at += k as usize;
                continue;
            }
            0x06 => return (k, looked),
            0x15 => a == k,
            0x25 => a > k,
            0x35 => a >= k,
            0x45 => a & k != 0,
            code => panic!("instruction {code:#x}"),
        };
        at += usize::from(if holds { yes } else { no });
    }
}
