//! What is verified before anything moves: both hosts' facts, which are compared by a pure function, and what the container's
//! configuration wants of the destination.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use oci_spec::runtime::Spec;

use super::wire::message::Finding;
use crate::runtime::Store;
use crate::sys::{clock, cpu, proc};

/// What a host is.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Host {
    #[prost(string, tag = "1")]
    pub lmrun: String,
    #[prost(string, tag = "2")]
    pub kernel: String,
    #[prost(string, tag = "3")]
    pub machine: String,
    #[prost(uint64, tag = "4")]
    pub page_size: u64,
    #[prost(string, tag = "5")]
    pub cpu: String,
    /// Of /proc/cpuinfo, those that programs use.
    #[prost(string, repeated, tag = "6")]
    pub cpu_flags: Vec<String>,
    /// XCR0; 0: no xsave.
    #[prost(uint64, tag = "7")]
    pub xsave_features: u64,
    #[prost(uint32, tag = "8")]
    pub xsave_size: u32,
    /// `1`, `2`, `hybrid`.
    #[prost(string, tag = "9")]
    pub cgroup: String,
    /// Bytes.
    #[prost(uint64, tag = "10")]
    pub free_memory: u64,
    /// Bytes, where the bundle is or will be.
    #[prost(uint64, tag = "11")]
    pub free_disk: u64,
    #[prost(uint32, tag = "12")]
    pub pid_max: u32,
    #[prost(string, repeated, tag = "13")]
    pub lsms: Vec<String>,
    /// Names of actions.
    #[prost(string, repeated, tag = "14")]
    pub seccomp: Vec<String>,
    /// Pages of vvar and of vdso.
    #[prost(uint64, tag = "15")]
    pub vvar_pages: u64,
    #[prost(uint64, tag = "16")]
    pub vdso_pages: u64,
    /// Features of the kernel that were found by trying: see [`FEATURES`].
    #[prost(string, repeated, tag = "17")]
    pub features: Vec<String>,
    /// TCP congestion control.
    #[prost(string, repeated, tag = "18")]
    pub congestion: Vec<String>,
    /// CLOCK_REALTIME in ns.
    #[prost(int64, tag = "19")]
    pub realtime: i64,
}

/// What the container takes.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Needs {
    /// Bytes of memory that have to be carried.
    #[prost(uint64, tag = "1")]
    pub memory: u64,
    #[prost(uint32, tag = "2")]
    pub threads: u32,
    /// It is to go on before all of its memory is there.
    #[prost(bool, tag = "3")]
    pub post_copy: bool,
    /// It moves as it runs, and not stopped.
    #[prost(bool, tag = "4")]
    pub live: bool,
}

/// Writes are noted by the kernel (userfaultfd WP_ASYNC, since 6.7).
const TRACKING: &str = "dirty-tracking";
/// time_namespaces(7), since 5.6.
const TIME_NAMESPACES: &str = "time-namespaces";

/// Extensions that a program, having found them, goes on using. (Names of arch/x86/include/asm/cpufeatures.h.)
const USER_FLAGS: &[&str] = &[
    "3dnow",
    "abm",
    "adx",
    "aes",
    "amx_bf16",
    "amx_int8",
    "amx_tile",
    "avx",
    "avx2",
    "avx512_4fmaps",
    "avx512_4vnniw",
    "avx512_bf16",
    "avx512_bitalg",
    "avx512_fp16",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_vp2intersect",
    "avx512_vpopcntdq",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512er",
    "avx512f",
    "avx512ifma",
    "avx512pf",
    "avx512vbmi",
    "avx512vl",
    "avx_vnni",
    "bmi1",
    "bmi2",
    "cldemote",
    "clflush",
    "clflushopt",
    "clwb",
    "clzero",
    "cx16",
    "cx8",
    "erms",
    "f16c",
    "fma",
    "fma4",
    "fsgsbase",
    "fsrm",
    "fxsr",
    "gfni",
    "lahf_lm",
    "lzcnt",
    "mmx",
    "movbe",
    "movdir64b",
    "movdiri",
    "mwaitx",
    "ospke",
    "pclmulqdq",
    "pku",
    "popcnt",
    "prefetchw",
    "rdpid",
    "rdrand",
    "rdseed",
    "rdtscp",
    "rtm",
    "serialize",
    "sha_ni",
    "sse",
    "sse2",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "ssse3",
    "tbm",
    "tsc",
    "umip",
    "user_shstk",
    "vaes",
    "vpclmulqdq",
    "waitpkg",
    "xop",
    "xsave",
    "xsavec",
    "xsaveopt",
    "xgetbv1",
];

/// Memory that should be left at the destination: a sixteenth of what the container takes.
const SPARE: u64 = 16;
/// Difference of the hosts' clocks that one should know of.
const CLOCKS: i64 = 1_000_000_000;

/// This host's facts; `place` is where the bundle is or will be.
pub fn host(place: &Path) -> Host {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let words = |path: &str, between: &[char]| {
        text(path).split(between).filter(|word| !word.trim().is_empty()).map(|word| word.trim().to_owned()).collect()
    };
    let uname = nix::sys::utsname::uname().ok();
    let release = uname.as_ref().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    let machine = uname.as_ref().map(|u| u.machine().to_string_lossy().into_owned()).unwrap_or_default();
    let cpuinfo = text("/proc/cpuinfo");
    let of_cpu = |key: &str| {
        let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|k| k.trim() == key));
        line.and_then(|line| line.split_once(':')).map_or(String::new(), |(_, value)| value.trim().to_owned())
    };
    let flags = of_cpu("flags");
    let xsave = cpu::xsave();
    let maps = proc::maps(std::process::id().cast_signed()).unwrap_or_default();
    let pages = |names: &[&[u8]]| -> u64 {
        maps.iter().filter(|map| names.contains(&&map.name[..])).map(|map| (map.end - map.start) / 4096).sum()
    };
    let mut features = Vec::new();
    if crate::engine::can_track() {
        features.push(TRACKING.to_owned());
    }
    if Path::new("/proc/self/ns/time").exists() {
        features.push(TIME_NAMESPACES.to_owned());
    }
    Host {
        lmrun: env!("CARGO_PKG_VERSION").into(),
        kernel: release,
        machine,
        page_size: nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(0) as u64,
        cpu: of_cpu("model name"),
        cpu_flags: flags.split(' ').filter(|flag| USER_FLAGS.contains(flag)).map(str::to_owned).collect(),
        xsave_features: xsave.map_or(0, |xsave| xsave.features),
        xsave_size: xsave.map_or(0, |xsave| xsave.size),
        cgroup: cgroup().into(),
        free_memory: kib(&text("/proc/meminfo"), "MemAvailable:"),
        free_disk: free_disk(place),
        pid_max: text("/proc/sys/kernel/pid_max").trim().parse().unwrap_or(0),
        lsms: words("/sys/kernel/security/lsm", &[',']),
        seccomp: words("/proc/sys/kernel/seccomp/actions_avail", &[' ']),
        vvar_pages: pages(&[b"[vvar]", b"[vvar_vclock]"]),
        vdso_pages: pages(&[b"[vdso]"]),
        features,
        congestion: words("/proc/sys/net/ipv4/tcp_available_congestion_control", &[' ']),
        realtime: clock::realtime() as i64,
    }
}

fn cgroup() -> &'static str {
    match () {
        () if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() => "2",
        () if Path::new("/sys/fs/cgroup/unified/cgroup.controllers").exists() => "hybrid",
        () => "1",
    }
}

/// Bytes, from a line like `MemAvailable:  123 kB`.
fn kib(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// Of the file system that a path is on, or will be once it is made.
fn free_disk(place: &Path) -> u64 {
    let there = place.ancestors().find_map(|path| statvfs(path).ok());
    there.map_or(0, |fs| fs.blocks_available() * fs.fragment_size())
}

/// What processes of these host pids take.
pub fn needs(pids: &[i32], post_copy: bool, live: bool) -> Needs {
    let each = |pid: &i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let threads = status.lines().find_map(|line| line.strip_prefix("Threads:")?.trim().parse::<u32>().ok());
        let memory = ["RssAnon:", "RssShmem:", "VmSwap:"].iter().map(|key| kib(&status, key)).sum::<u64>();
        (memory, threads.unwrap_or(0))
    };
    let (memory, threads) = pids.iter().map(each).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    Needs { memory, threads, post_copy, live }
}

/// What the two hosts' facts mean for a container.
pub fn compare(source: &Host, destination: &Host, needs: &Needs) -> Vec<Finding> {
    let mut all = Findings(Vec::new());
    let stop = "stop it here and start it there (--offline)";
    all.add(source.machine != destination.machine, "destination", "machine", || {
        (
            format!("is a {} where the source is a {}", destination.machine, source.machine),
            "choose a host of the same kind",
        )
    });
    all.add(source.page_size != destination.page_size, "destination", "memory", || {
        let (there, here) = (destination.page_size, source.page_size);
        (format!("has pages of {there} bytes where the source has {here}"), "choose a host of the same kind")
    });
    all.warn(source.lmrun != destination.lmrun, "both", "lmrun", || {
        (
            format!("versions differ: {} here, {} there", source.lmrun, destination.lmrun),
            "use the same one if anything fails",
        )
    });
    if needs.live {
        let has: BTreeSet<&String> = destination.cpu_flags.iter().collect();
        let lacking: Vec<&str> = source.cpu_flags.iter().filter(|f| !has.contains(f)).map(String::as_str).collect();
        all.add(!lacking.is_empty(), "destination", "processor", || {
            let what = format!("({}) lacks {}, which programs may have found here", destination.cpu, lacking.join(" "));
            (what, "choose a host with such a processor, or --offline")
        });
        let missing = source.xsave_features & !destination.xsave_features;
        all.add(missing != 0, "destination", "xsave", || {
            (format!("does not save register state {missing:#x}, which tasks may hold"), stop)
        });
        let (here, there) = (source.xsave_size, destination.xsave_size);
        all.warn(missing == 0 && here != there, "destination", "xsave", || {
            (
                format!("saves registers in {there} bytes where the source takes {here}"),
                "none; signal frames may differ in size",
            )
        });
        let vdso = |host: &Host| (host.vvar_pages, host.vdso_pages);
        all.add(vdso(source) != vdso(destination), "destination", "vdso", || {
            let ((a, b), (c, d)) = (vdso(source), vdso(destination));
            let what =
                format!("has vvar and vdso of {c} and {d} pages where the source has {a} and {b}: addresses differ");
            (what, "use the same kernel at both ends, or --offline")
        });
        let has = |host: &Host, feature: &str| host.features.iter().any(|one| one == feature);
        all.warn(!has(source, TRACKING), "source", "kernel", || {
            let what = "cannot note which pages are written: every round copies all".to_owned();
            (what, "use Linux 6.7 or later, or --offline")
        });
        all.add(!has(destination, TIME_NAMESPACES), "destination", "kernel", || {
            ("has no time namespaces: the container's clocks would jump".to_owned(), stop)
        });
        let lacking: Vec<&str> = lacks(&source.congestion, &destination.congestion);
        all.warn(!lacking.is_empty(), "destination", "tcp", || {
            let what = format!("does not have TCP congestion control {}", lacking.join(" "));
            (what, "load its module there; connections that use it cannot be carried")
        });
    }
    let wanted = needs.memory + needs.memory / SPARE;
    all.add(needs.memory > destination.free_memory, "destination", "memory", || {
        let (mib, free) = (needs.memory >> 20, destination.free_memory >> 20);
        (format!("has {free} MiB where the container takes {mib} MiB"), "free some there, or choose another host")
    });
    let little = needs.memory <= destination.free_memory && wanted > destination.free_memory;
    all.warn(little, "destination", "memory", || {
        let free = destination.free_memory >> 20;
        (format!("has {free} MiB: hardly more than the container takes"), "free some there")
    });
    all.add(needs.threads >= destination.pid_max, "destination", "pid_max", || {
        (
            format!("is {} where the container has {} threads", destination.pid_max, needs.threads),
            "raise kernel.pid_max there",
        )
    });
    all.warn(source.cgroup != destination.cgroup, "both", "cgroup", || {
        let what = format!("versions differ: {} here, {} there", source.cgroup, destination.cgroup);
        (what, "limits are set anew from config.json; what only one version knows is left out or refused")
    });
    let lacking = lacks(&source.seccomp, &destination.seccomp);
    all.warn(!lacking.is_empty(), "destination", "seccomp", || {
        (
            format!("does not know the action {}", lacking.join(" ")),
            "use a kernel that does if the container's filter needs it",
        )
    });
    let major = |host: &Host| -> Vec<String> {
        host.lsms.iter().filter(|lsm| ["apparmor", "selinux", "smack"].contains(&lsm.as_str())).cloned().collect()
    };
    let (here, there) = (major(source), major(destination));
    all.warn(here != there, "both", "lsm", || {
        let list = |lsms: &[String]| if lsms.is_empty() { "none".to_owned() } else { lsms.join(" ") };
        (
            format!("security modules differ: {} here, {} there", list(&here), list(&there)),
            "see to it that its profile is what you want there",
        )
    });
    let apart = source.realtime - destination.realtime;
    all.warn(apart.abs() > CLOCKS, "both", "clock", || {
        let (by, which) = (apart.abs() as f64 / 1e9, if apart > 0 { "source" } else { "destination" });
        (format!("the {which} is ahead by {by:.1} s (CLOCK_REALTIME)"), "set the clocks by NTP")
    });
    all.0
}

/// What of `here` is not `there`.
fn lacks<'a>(here: &'a [String], there: &[String]) -> Vec<&'a str> {
    here.iter().filter(|one| !there.contains(one)).map(String::as_str).collect()
}

/// Collects findings.
struct Findings(Vec<Finding>);

impl Findings {
    /// One that blocks, if it is so.
    fn add(&mut self, is: bool, end: &str, place: &str, say: impl FnOnce() -> (String, &'static str)) {
        self.push(is, true, end, place, say);
    }

    fn warn(&mut self, is: bool, end: &str, place: &str, say: impl FnOnce() -> (String, &'static str)) {
        self.push(is, false, end, place, say);
    }

    fn push(&mut self, is: bool, blocks: bool, end: &str, place: &str, say: impl FnOnce() -> (String, &'static str)) {
        if is {
            let (what, remedy) = say();
            self.0.push(Finding { what, place: format!("{end}: {place}"), remedy: remedy.into(), blocks });
        }
    }
}

/// What the configuration of container `id` wants that is not at the destination, where its bundle is at `bundle`. Its root
/// file system comes along if it is not there.
pub fn place(store: &Store, id: &str, bundle: &Path, config: &[u8]) -> Vec<Finding> {
    let mut all = Findings(Vec::new());
    let here = "destination";
    all.add(store.load(id).is_ok(), here, id, || {
        ("there is a container of this name".to_owned(), "delete it there first")
    });
    let Some(spec) = all.spec(config) else { return all.0 };
    let missing = |all: &mut Findings, what: &str, path: &Path, remedy: &'static str| {
        all.add(!path.exists(), here, what, || (format!("{} is not there", path.display()), remedy));
    };
    for mount in spec.mounts().iter().flatten() {
        let bind = |options: &Vec<String>| options.iter().any(|option| option == "bind" || option == "rbind");
        let is_bind = mount.typ().as_deref() == Some("bind") || mount.options().as_ref().is_some_and(bind);
        if let Some(source) = mount.source().as_ref().filter(|_| is_bind) {
            let what = format!("bind mount {}", mount.destination().display());
            missing(&mut all, &what, &bundle.join(source), "make it there, or move its content first");
        }
    }
    let linux = spec.linux().as_ref();
    for namespace in linux.and_then(|linux| linux.namespaces().as_ref()).into_iter().flatten() {
        if let Some(path) = namespace.path() {
            let what = format!("{} namespace", namespace.typ());
            missing(&mut all, &what, path, "make it there, under the same path");
        }
    }
    all.kernel(&spec);
    all.0
}

/// As [`place`], for a container whose mounts and namespaces are an engine's affair.
pub fn kernel(config: &[u8]) -> Vec<Finding> {
    let mut all = Findings(Vec::new());
    if let Some(spec) = all.spec(config) {
        all.kernel(&spec);
    }
    all.0
}

impl Findings {
    fn spec(&mut self, config: &[u8]) -> Option<Spec> {
        serde_json::from_slice(config)
            .map_err(|error| {
                self.add(true, "container", "config.json", || (format!("cannot be read: {error}"), "mend it"));
            })
            .ok()
    }

    /// What the container wants of the kernel and its drivers.
    fn kernel(&mut self, spec: &Spec) {
        let (all, here) = (self, "destination");
        let linux = spec.linux().as_ref();
        // A device that is a number is made; what it stands for must be there.
        for device in linux.and_then(|linux| linux.devices().as_ref()).into_iter().flatten() {
            let (major, minor, path) = (device.major(), device.minor(), device.path());
            let kind = if device.typ().as_str() == "b" { "block" } else { "char" };
            let known = PathBuf::from(format!("/sys/dev/{kind}/{major}:{minor}"));
            // Not all drivers say so there; /dev does as well.
            let there = known.exists() || path.exists() || !matches!(device.typ().as_str(), "b" | "c" | "u");
            all.add(!there, here, "device", || {
                (format!("{} ({kind} {major}:{minor}) is not there", path.display()), "load its driver there")
            });
        }
        if let Some(profile) = spec.process().as_ref().and_then(|process| process.apparmor_profile().as_ref()) {
            let loaded = fs::read_to_string("/sys/kernel/security/apparmor/profiles").unwrap_or_default();
            let there = profile == "unconfined" || loaded.lines().any(|line| line.split(" (").next() == Some(profile));
            all.add(!there, here, "apparmor", || {
                (format!("profile {profile} is not loaded"), "load it there (apparmor_parser -r)")
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Host {
        Host {
            lmrun: "1".into(),
            kernel: "6.18".into(),
            machine: "x86_64".into(),
            page_size: 4096,
            cpu: "Model".into(),
            cpu_flags: ["sse2", "avx2"].map(str::to_owned).to_vec(),
            xsave_features: 7,
            xsave_size: 832,
            cgroup: "2".into(),
            free_memory: 1 << 30,
            free_disk: 1 << 30,
            pid_max: 32768,
            lsms: vec!["apparmor".into()],
            seccomp: vec!["allow".into()],
            vvar_pages: 4,
            vdso_pages: 2,
            features: [TRACKING, TIME_NAMESPACES].map(str::to_owned).to_vec(),
            congestion: vec!["cubic".into()],
            realtime: 0,
        }
    }

    const NEEDS: Needs = Needs { memory: 100 << 20, threads: 10, post_copy: false, live: true };

    /// Places of what is found when the destination is changed so; those that block end in `!`.
    fn found(change: impl FnOnce(&mut Host)) -> Vec<String> {
        let mut there = example();
        change(&mut there);
        let all = compare(&example(), &there, &NEEDS);
        assert!(all.iter().all(|f| !f.what.is_empty() && !f.remedy.is_empty()));
        all.into_iter().map(|f| f.place + if f.blocks { "!" } else { "" }).collect()
    }

    #[test]
    fn hosts_that_are_alike_fit() {
        assert_eq!(found(|_| ()), [""; 0]);
        assert_eq!(found(|there| there.cpu_flags.push("avx512f".into())), [""; 0], "more is no harm");
    }

    #[test]
    fn each_difference_is_found() {
        assert_eq!(found(|there| there.machine = "aarch64".into()), ["destination: machine!"]);
        assert_eq!(found(|there| there.page_size = 16384), ["destination: memory!"]);
        assert_eq!(found(|there| there.lmrun = "2".into()), ["both: lmrun"]);
        assert_eq!(found(|there| there.cpu_flags.truncate(1)), ["destination: processor!"]);
        assert_eq!(found(|there| there.xsave_features = 3), ["destination: xsave!"]);
        assert_eq!(found(|there| there.xsave_size = 2696), ["destination: xsave"]);
        assert_eq!(found(|there| there.vdso_pages = 3), ["destination: vdso!"]);
        assert_eq!(found(|there| there.features.retain(|f| f == TRACKING)), ["destination: kernel!"]);
        assert_eq!(found(|there| there.congestion.clear()), ["destination: tcp"]);
        assert_eq!(found(|there| there.free_memory = 50 << 20), ["destination: memory!"]);
        assert_eq!(found(|there| there.free_memory = 101 << 20), ["destination: memory"]);
        assert_eq!(found(|there| there.pid_max = 10), ["destination: pid_max!"]);
        assert_eq!(found(|there| there.cgroup = "1".into()), ["both: cgroup"]);
        assert_eq!(found(|there| there.seccomp.clear()), ["destination: seccomp"]);
        assert_eq!(found(|there| there.lsms.clear()), ["both: lsm"]);
        assert_eq!(found(|there| there.realtime = 2 * CLOCKS), ["both: clock"]);
    }

    #[test]
    fn the_source_matters_too_and_offline_less() {
        let mut here = example();
        here.features.clear();
        assert_eq!(compare(&here, &example(), &NEEDS)[0].place, "source: kernel");
        let mut there = example();
        (there.vdso_pages, there.xsave_features) = (9, 3);
        there.cpu_flags.clear();
        assert!(compare(&example(), &there, &Needs { live: false, ..NEEDS }).is_empty());
    }

    #[test]
    fn this_host_fits_itself_and_has_facts() {
        let host = host(Path::new("/nonexistent/a"));
        assert!(host.page_size == 4096 && host.free_memory > 0 && host.pid_max > 0 && host.vdso_pages > 0);
        assert!(host.free_disk > 0 && !host.cpu_flags.is_empty() && !host.congestion.is_empty());
        let needs = needs(&[std::process::id().cast_signed()], false, true);
        assert!(needs.memory > 0 && needs.threads > 0);
        assert!(compare(&host, &host, &Needs { memory: 0, ..needs }).iter().all(|finding| !finding.blocks));
    }

    #[test]
    fn what_the_configuration_wants_must_be_there() {
        let config = br#"{
            "ociVersion": "1.0.2", "root": {"path": "/nonexistent/rootfs"},
            "process": {"cwd": "/", "args": ["a"], "user": {"uid": 0, "gid": 0}, "apparmorProfile": "no-such-profile"},
            "mounts": [
                {"destination": "/data", "type": "none", "source": "/nonexistent/data", "options": ["rbind", "rw"]},
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/etc", "type": "bind", "source": "/etc"}],
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "network", "path": "/nonexistent/netns"}],
                "devices": [{"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
                            {"path": "/dev/nonexistent", "type": "b", "major": 4000, "minor": 1}]}}"#;
        let store = Store::new("/nonexistent/state");
        let places: Vec<String> =
            place(&store, "web1", Path::new("/b"), config).into_iter().map(|finding| finding.place).collect();
        let expected = [
            "destination: bind mount /data",
            "destination: net namespace",
            "destination: device",
            "destination: apparmor",
        ];
        assert_eq!(places, expected);
        assert_eq!(place(&store, "web1", Path::new("/b"), b"{")[0].place, "container: config.json");
    }
}
