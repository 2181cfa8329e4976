//! Tests of the suite that no runtime passes, by name. docs/conformance.md has the evidence.

use super::View;

/// Why a test fails for everybody where cgroups are mounted so.
pub fn explanation(test: &str, view: View) -> Option<&'static str> {
    let with_cgroups = test.starts_with("linux_cgroups_") || test.starts_with("delete_");
    let of = |list: &[(&str, &'static str)]| list.iter().find(|(name, _)| *name == test).map(|(_, why)| *why);
    match of(EVERYWHERE) {
        None if with_cgroups && view == View::Unified => Some("suite: reads the files of cgroup v1"),
        None if view == View::Host => of(WITH_CONTROLLERS),
        everywhere => everywhere,
    }
}

const EVERYWHERE: &[(&str, &str)] = &[
    ("delete", "runc's way: what is created but not started may be deleted"),
    ("hooks", "suite: expects words that its hooks do not print"),
    ("linux_process_apparmor_profile", "host: no AppArmor"),
    ("misc_props", "suite: the program of its container is not in the bundle"),
    ("pidfile", "suite: kills a process that has ended"),
    ("prestart", "suite older than the specification: prestart hooks are part of create"),
    ("process_capabilities", "host: root without CAP_SYS_RESOURCE"),
    ("process_capabilities_fail", "suite older than the specification: unknown capabilities are a warning"),
    ("process_rlimits", "suite: Go itself raises the limit of open files before it is looked at"),
    ("start", "suite: demands success where its own message demands an error"),
];

/// Where version 1 controllers are mounted.
const WITH_CONTROLLERS: &[(&str, &str)] = &[
    ("linux_cgroups_blkio", "kernel: blkio.weight and leaf_weight are gone"),
    ("linux_cgroups_relative_blkio", "kernel: blkio.weight and leaf_weight are gone"),
    ("linux_cgroups_hugetlb", "host: no hugetlb in version 1"),
    ("linux_cgroups_relative_hugetlb", "host: no hugetlb in version 1"),
    ("linux_cgroups_memory", "kernel: limits of kernel memory are gone"),
    ("linux_cgroups_relative_memory", "kernel: limits of kernel memory are gone"),
    ("linux_cgroups_network", "host: no net_cls and net_prio"),
    ("linux_cgroups_relative_network", "host: no net_cls and net_prio"),
];

/// These hang on who is faster, the suite or the program in its container: they are tried again.
pub const RACES: &[&str] = &["killsig", "pidfile", "poststart"];
