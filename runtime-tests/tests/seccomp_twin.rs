//! One profile, compiled by lmrun and by runc (with libseccomp), taken from running containers: the same verdict everywhere.

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

#[test]
fn verdicts_are_runcs() {
    if !needs::root() {
        return;
    }
    let Some(runc) = needs::on_path("runc") else {
        return needs::skip("runc is not installed");
    };
    // What Debian 12's libseccomp knows.
    let seccomp = Some(profile::docker_like(448));
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
    let differences = differences(&filters[0], &filters[1]);
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

fn differences(ours: &[Instruction], theirs: &[Instruction]) -> Vec<Difference> {
    const X32: u32 = 0x4000_0000;
    let mut values = vec![0, 1, 2, 7, 8, 9, 39, 40, 41, 0x1ffff, 0x20000, 0x20001, 0x20008, 0x20009, 0xffff_fffe];
    values.extend([0xffff_ffff, 0x1_0000_0000, 0x1_0000_0028, u64::MAX]);
    values.extend((0..64).map(|bit| 1_u64 << bit));
    let mut differences = Vec::new();
    for (arch, base) in
        [(0xC000_003E, 0), (0xC000_003E, X32), (0x4000_0003, 0), (0xC000_00B7, 0), (0xC000_003E, u32::MAX)]
    {
        for number in (0..600).chain([1000, 0x3fff_ffff]).map(|n| base | n) {
            for (place, value) in [0, 1].into_iter().flat_map(|place| values.iter().map(move |value| (place, *value))) {
                let mut args = [0; 6];
                args[place] = value;
                let verdicts = (verdict(ours, arch, number, args), verdict(theirs, arch, number, args));
                if verdicts.0 != verdicts.1 {
                    differences.push((arch, number, place, value, verdicts.0, verdicts.1));
                }
            }
        }
    }
    differences
}

/// What the kernel would make of one call.
fn verdict(program: &[Instruction], arch: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut data = vec![number, arch, 0, 0];
    data.extend(args.iter().flat_map(|arg| [*arg as u32, (*arg >> 32) as u32]));
    let (mut at, mut a) = (0, 0_u32);
    loop {
        let (code, yes, no, k) = program[at];
        at += 1;
        let holds = match code {
            0x20 => {
                a = data[k as usize / 4];
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
            0x06 => return k,
            0x15 => a == k,
            0x25 => a > k,
            0x35 => a >= k,
            0x45 => a & k != 0,
            code => panic!("instruction {code:#x}"),
        };
        at += usize::from(if holds { yes } else { no });
    }
}
