//! A seccomp profile of the shape and size of those that engines use: some 350 calls allowed by name, a few by their
//! arguments, one that does not exist, all others refused.

use serde_json::{Value, json};

/// What Docker's documentation lists as blocked, and what came into the kernel since.
const BLOCKED: &[&str] = &[
    "acct",
    "add_key",
    "bpf",
    "clock_adjtime",
    "clock_settime",
    "clone",
    "clone3",
    "create_module",
    "delete_module",
    "finit_module",
    "get_kernel_syms",
    "get_mempolicy",
    "init_module",
    "ioperm",
    "iopl",
    "kcmp",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "mbind",
    "mount",
    "move_pages",
    "nfsservctl",
    "open_by_handle_at",
    "perf_event_open",
    "personality",
    "pivot_root",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "query_module",
    "quotactl",
    "reboot",
    "request_key",
    "set_mempolicy",
    "setns",
    "settimeofday",
    "socket",
    "stime",
    "swapon",
    "swapoff",
    "sysfs",
    "_sysctl",
    "umount",
    "umount2",
    "unshare",
    "uselib",
    "userfaultfd",
    "ustat",
    "vm86",
    "vm86old",
    "fsopen",
    "fsconfig",
    "fsmount",
    "fspick",
    "move_mount",
    "open_tree",
    "mount_setattr",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
    "syslog",
    "vhangup",
];

/// Names of system calls with a number of some x86 architecture.
const TABLE: &str = include_str!("../../src/runtime/seccomp/syscalls.tsv");

/// The profile as it stands in config.json, with calls up to number `newest`.
pub fn docker_like(newest: u32) -> Value {
    let names = TABLE.lines().filter_map(|line| {
        let mut fields = line.split('\t');
        let name = fields.next()?;
        fields.take(2).filter_map(|number| number.parse().ok()).all(|number: u32| number <= newest).then_some(name)
    });
    let allowed: Vec<_> = names.filter(|name| !name.starts_with('#') && !BLOCKED.contains(name)).collect();
    let argument = |index: u32, value: u64, op: &str| json!([{ "index": index, "value": value, "op": op }]);
    let allow = |name: &str, args: Value| json!({ "names": [name], "action": "SCMP_ACT_ALLOW", "args": args });
    let mut rules = vec![json!({ "names": allowed, "action": "SCMP_ACT_ALLOW" })];
    rules.push(allow("socket", argument(0, 40, "SCMP_CMP_NE")));
    for value in [0, 8, 0x20000, 0x20008, 0xffff_ffff] {
        rules.push(allow("personality", argument(0, value, "SCMP_CMP_EQ")));
    }
    rules.push(allow("clone", argument(0, 0x7e02_0000, "SCMP_CMP_MASKED_EQ")));
    rules.push(json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 }));
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules,
    })
}
