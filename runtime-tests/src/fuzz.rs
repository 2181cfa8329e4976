//! Hostile input for what reads files and connections: whatever it is, the answer is an error and not a panic, and takes
//! neither much memory nor much time.
//!
//! A round is made of its number alone, so that what a run has found can be tried again.

use std::fs::{self, File};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lmrun::engine::{self, RestoreRequest};
use lmrun::image::dir::ImageDir;
use lmrun::image::format;
use lmrun::image::page_source::page_extents;
use lmrun::image::pages::PagesOf;
use lmrun::image::records::mm::pe;
use lmrun::runtime;
use lmrun::transfer::page_server;
use lmrun::transfer::protocol::Message;
use nix::sys::resource::{Resource, setrlimit};
use serde_json::{Value, json};

/// What a round may take at most, on a busy machine.
const LONGEST: Duration = Duration::from_secs(20);

/// Numbers by xorshift64*, from a seed.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.roll() >> 16) as usize % n.max(1)
    }

    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// A number that programs stumble over.
    pub fn number(&mut self) -> u64 {
        let powers = 1_u64 << self.below(64);
        *[
            0,
            1,
            2,
            powers,
            powers.wrapping_sub(1),
            u64::MAX,
            i64::MAX as u64,
            i64::MIN as u64,
            self.roll(),
            self.roll() & 0xffff,
        ]
        .get(self.below(10))
        .unwrap_or(&0)
    }
}

/// Something that is fed.
pub trait Target {
    fn name(&self) -> &'static str;
    /// One round. It may do anything but panic.
    fn feed(&mut self, dice: &mut Dice);
}

/// Feeds `target` until it was long enough; gives the number of rounds.
///
/// # Panics
/// With the round's number, when the target does or takes too long.
pub fn run(target: &mut dyn Target, first: u64, duration: Duration) -> u64 {
    // A length that is believed before it is checked shows.
    let memory = 8 << 30;
    let _ = setrlimit(Resource::RLIMIT_AS, memory, memory);
    let begin = Instant::now();
    let mut round = first;
    while begin.elapsed() < duration {
        let at = Instant::now();
        let fed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| target.feed(&mut Dice::new(round))));
        assert!(fed.is_ok(), "{}: round {round} panicked", target.name());
        assert!(at.elapsed() < LONGEST, "{}: round {round} took {:?}", target.name(), at.elapsed());
        round += 1;
    }
    round - first
}

/// A directory of one's own, removed when dropped.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("lmrun-fuzz-{}-{n}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).expect("the directory for temporary files can be written");
        Scratch(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// config.json with values, members and bytes exchanged.
#[derive(Debug)]
pub struct Config {
    bundle: Scratch,
    plain: Value,
}

const WORDS: [&str; 24] = [
    "",
    "/",
    "..",
    "../..",
    "/proc/self/fd/3",
    "a\0b",
    "\u{fffd}",
    "ro",
    "rbind",
    "idmap",
    "size=1e99",
    "SCMP_ACT_NOTIFY",
    "SCMP_ACT_ALLOW",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_ARCH_X86",
    "user",
    "network",
    "1.0.2",
    "0-99999999999",
    "CAP_SYS_ADMIN",
    "SCHED_DEADLINE",
    "clone",
    "socket",
    "MPOL_BIND",
];

impl Config {
    pub fn new() -> Config {
        let bundle = Scratch::new("config");
        fs::create_dir(bundle.0.join("rootfs")).expect("it is ours");
        let mapping = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
        let plain = json!({
            "ociVersion": "1.3.0", "hostname": "h", "domainname": "d", "annotations": { "a": "b" },
            "root": { "path": "rootfs", "readonly": true },
            "process": {
                "terminal": true, "consoleSize": { "height": 1, "width": 1 }, "cwd": "/", "args": ["a", "b"], "env": ["A=B"],
                "user": { "uid": 0, "gid": 0, "umask": 18, "additionalGids": [1] }, "noNewPrivileges": true, "oomScoreAdj": 1,
                "capabilities": { "bounding": ["CAP_KILL"], "ambient": ["CAP_KILL"] },
                "rlimits": [{ "type": "RLIMIT_CORE", "soft": 1, "hard": 1 }], "apparmorProfile": "", "selinuxLabel": "",
                "scheduler": { "policy": "SCHED_OTHER", "nice": 1, "flags": ["SCHED_FLAG_RESET_ON_FORK"] },
                "ioPriority": { "class": "IOPRIO_CLASS_BE", "priority": 1 }, "execCPUAffinity": { "initial": "0-1", "final": "0" },
            },
            "mounts": [{ "destination": "/a", "type": "tmpfs", "source": "b", "options": ["ro", "size=1"] },
                { "destination": "/m", "source": "/tmp", "options": ["bind", "idmap"], "uidMappings": mapping, "gidMappings": mapping }],
            "hooks": { "prestart": [{ "path": "/a", "args": ["a"], "env": ["A=B"], "timeout": 1 }], "poststop": [{ "path": "/a" }] },
            "linux": {
                "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" },
                    { "type": "time" }],
                "timeOffsets": { "monotonic": { "secs": 1, "nanosecs": 1 } }, "cgroupsPath": "/a/b",
                "sysctl": { "net.ipv4.ip_forward": "1" }, "devices": [{ "path": "/dev/x", "type": "c", "major": 1, "minor": 1, "fileMode": 1 }],
                "netDevices": { "eth0": { "name": "a" } }, "rootfsPropagation": "shared", "maskedPaths": ["/a"], "readonlyPaths": ["/b"],
                "intelRdt": { "schemata": ["L3:0=f"] }, "memoryPolicy": { "mode": "MPOL_DEFAULT" },
                "personality": { "domain": "LINUX", "flags": ["ADDR_NO_RANDOMIZE"] },
                "resources": { "devices": [{ "allow": true, "type": "c", "major": 1, "minor": 1, "access": "rwm" }],
                    "memory": { "limit": 1 }, "cpu": { "shares": 1, "quota": 1 }, "pids": { "limit": 1 }, "unified": { "a": "b" } },
                "seccomp": { "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"],
                    "syscalls": [{ "names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{ "index": 0, "value": 1, "op": "SCMP_CMP_EQ" }] }] },
            },
        });
        Config { bundle, plain }
    }

    fn check(&self, text: &[u8]) -> bool {
        fs::write(self.bundle.0.join("config.json"), text).expect("it is ours");
        runtime::check_bundle(&self.bundle.0).is_ok()
    }

    /// What all rounds begin with is a config.
    pub fn plain_is_good(&self) -> bool {
        let mut plain = self.plain.clone();
        // Where nobody is root, none of these can be given.
        plain["process"]["capabilities"] = json!({});
        self.check(plain.to_string().as_bytes())
    }
}

impl Default for Config {
    fn default() -> Self {
        Config::new()
    }
}

fn any_value(dice: &mut Dice) -> Value {
    match dice.below(9) {
        0 => Value::Null,
        1 => json!(dice.once_in(2)),
        2 => json!(dice.number()),
        3 => json!(dice.number() as i64),
        4 => json!(dice.roll() as f64 / 1e3),
        5 => json!([any_value(dice)]),
        6 => json!({ (*dice.pick(&WORDS)): any_value(dice) }),
        7 => json!("x".repeat(1 << dice.below(17))),
        _ => json!(*dice.pick(&WORDS)),
    }
}

fn mutate(value: &mut Value, dice: &mut Dice) {
    if dice.once_in(6) {
        *value = any_value(dice);
        return;
    }
    match value {
        Value::Array(list) if dice.once_in(4) => match list.first().cloned() {
            Some(first) => list.extend(std::iter::repeat_n(first, dice.below(5))),
            None => list.push(any_value(dice)),
        },
        Value::Object(members) if dice.once_in(8) => {
            let name = members.keys().nth(dice.below(members.len())).cloned();
            name.map(|name| members.remove(&name));
        }
        Value::Array(list) if !list.is_empty() => {
            let at = dice.below(list.len());
            mutate(&mut list[at], dice);
        }
        Value::Object(members) if !members.is_empty() => {
            let at = dice.below(members.len());
            members.values_mut().nth(at).into_iter().for_each(|member| mutate(member, dice));
        }
        other => *other = any_value(dice),
    }
}

/// Bits, bytes and pieces of `bytes` changed.
fn damage(bytes: &mut Vec<u8>, dice: &mut Dice) {
    for _ in 0..=dice.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = dice.below(bytes.len());
        match dice.below(5) {
            0 => bytes[at] ^= 1 << dice.below(8),
            1 => bytes[at] = dice.roll() as u8,
            2 => bytes.truncate(at),
            3 => {
                let number = dice.number().to_le_bytes();
                bytes.iter_mut().skip(at).zip(number).for_each(|(byte, new)| *byte = new);
            }
            _ => {
                let piece = bytes[at..bytes.len().min(at + 16)].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
}

impl Target for Config {
    fn name(&self) -> &'static str {
        "config.json"
    }

    fn feed(&mut self, dice: &mut Dice) {
        let mut config = self.plain.clone();
        (0..=dice.below(3)).for_each(|_| mutate(&mut config, dice));
        let mut text = config.to_string().into_bytes();
        if dice.once_in(4) {
            damage(&mut text, dice);
        }
        self.check(&text);
    }
}

/// Seccomp profiles of every shape.
#[derive(Debug, Default)]
pub struct Seccomp(Config);

impl Target for Seccomp {
    fn name(&self) -> &'static str {
        "seccomp"
    }

    fn feed(&mut self, dice: &mut Dice) {
        const NAMES: [&str; 8] = ["read", "clone", "socket", "personality", "ioctl", "bogus", "mmap", "openat"];
        const ACTIONS: [&str; 8] = ["ALLOW", "ERRNO", "KILL", "KILL_PROCESS", "TRAP", "TRACE", "LOG", "NOTIFY"];
        const OPERATORS: [&str; 7] = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"];
        let action = |dice: &mut Dice| json!(format!("SCMP_ACT_{}", dice.pick(&ACTIONS)));
        let most = 1 << dice.below(9);
        let rules: Vec<_> = (0..dice.below(most))
            .map(|_| {
                let args: Vec<_> = (0..dice.below(5))
                    .map(|_| {
                        json!({ "index": dice.below(8), "value": dice.number(), "valueTwo": dice.number(),
                            "op": format!("SCMP_CMP_{}", dice.pick(&OPERATORS)) })
                    })
                    .collect();
                let names: Vec<_> = (0..=dice.below(3)).map(|_| *dice.pick(&NAMES)).collect();
                json!({ "names": names, "action": action(dice), "errnoRet": dice.number() as u32, "args": args })
            })
            .collect();
        let archs: Vec<_> =
            ["X86_64", "X86", "X32"].iter().filter(|_| dice.once_in(2)).map(|a| format!("SCMP_ARCH_{a}")).collect();
        let mut config = self.0.plain.clone();
        config["process"]["capabilities"] = json!({});
        config["linux"]["seccomp"] = json!({ "defaultAction": action(dice), "defaultErrnoRet": dice.number() as u32,
            "architectures": archs, "syscalls": rules, "listenerPath": "/nowhere", "flags": ["SECCOMP_FILTER_FLAG_LOG"] });
        self.0.check(config.to_string().as_bytes());
    }
}

/// A checkpoint's images, of which some are damaged; read one by one, and planned for a restore.
#[derive(Debug)]
pub struct Images {
    good: Vec<(String, Vec<u8>)>,
    dir: Scratch,
}

impl Images {
    /// From those of a real checkpoint.
    pub fn new(good: &Path) -> std::io::Result<Images> {
        let mut all = Vec::new();
        for entry in fs::read_dir(good)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            all.push((name, fs::read(entry.path())?));
        }
        all.sort();
        Ok(Images { good: all, dir: Scratch::new("images") })
    }

    /// The plan that the images give as they are.
    pub fn plan(&self) -> Result<(), String> {
        self.lay(|_, bytes| bytes);
        let request = RestoreRequest { work: self.dir.0.clone(), tcp_established: true, images: self.dir.0.clone() };
        engine::plan(request).map(drop).map_err(|e| runtime::chain(&e))
    }

    fn lay(&self, mut change: impl FnMut(&str, Vec<u8>) -> Vec<u8>) {
        for (name, bytes) in &self.good {
            let bytes = change(name, bytes.clone());
            let mut file = File::create(self.dir.0.join(name)).expect("it is ours");
            file.write_all(&bytes).expect("it is ours");
        }
    }
}

impl Target for Images {
    fn name(&self) -> &'static str {
        "images"
    }

    fn feed(&mut self, dice: &mut Dice) {
        let chosen = dice.below(self.good.len());
        let name = self.good[chosen].0.clone();
        self.lay(|at, mut bytes| {
            if at == name || dice.once_in(12) {
                // Behind the magic, mostly.
                let mut rest = bytes.split_off(bytes.len().min(if dice.once_in(8) { 0 } else { 8 }));
                damage(&mut rest, dice);
                bytes.extend(rest);
            }
            bytes
        });
        let request = RestoreRequest { work: self.dir.0.clone(), tcp_established: true, images: self.dir.0.clone() };
        let _ = engine::plan(request);
        if let Ok(dir) = ImageDir::open(&self.dir.0) {
            for id in 0..4 {
                let _ = page_extents(&dir, PagesOf::Task(id));
                let _ = page_extents(&dir, PagesOf::Shmem(id.into()));
                let _ = dir.read_all(&format::CORE, id.into());
                let _ = dir.read_all(&format::MM, id.into());
                let _ = dir.read_payloads(&format::PIPES_DATA, 0);
                let _ = dir.read_payloads(&format::SK_QUEUES, 0);
                let _ = dir.read_all(&format::TCP_STREAM, id.into());
            }
        }
    }
}

/// A page server whose client sends what it likes.
#[derive(Debug)]
pub struct PageServer(Scratch);

impl PageServer {
    pub fn new() -> PageServer {
        PageServer(Scratch::new("pages"))
    }

    fn message(dice: &mut Dice) -> Vec<u8> {
        let of = if dice.once_in(2) { PagesOf::Task(dice.below(3) as u32) } else { PagesOf::Shmem(dice.number()) };
        let flags = *dice.pick(&[pe::PRESENT, pe::PARENT, pe::PRESENT | pe::LAZY, 0, 64]);
        let message = match dice.below(6) {
            0 => Message::Open { of, answer: dice.once_in(2) },
            1 => Message::HasParent { of },
            2 => Message::Close,
            _ => Message::Add { of, vaddr: (dice.number() & 0xff) << 12, pages: dice.number() & 7, flags },
        };
        let mut bytes = message.encode().to_vec();
        if dice.once_in(3) {
            damage(&mut bytes, dice);
        }
        bytes.extend(vec![7; dice.below(3) * 4096]);
        bytes
    }
}

impl Default for PageServer {
    fn default() -> Self {
        PageServer::new()
    }
}

impl Target for PageServer {
    fn name(&self) -> &'static str {
        "page server"
    }

    fn feed(&mut self, dice: &mut Dice) {
        let images = self.0.0.join("images");
        let _ = fs::remove_dir_all(&images);
        let listener =
            page_server::listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), false).expect("loopback has ports");
        let address = listener.local_addr().expect("it listens");
        let sent: Vec<u8> = (0..=dice.below(12)).flat_map(|_| Self::message(dice)).collect();
        std::thread::scope(|scope| {
            let server = scope.spawn(|| page_server::serve(&listener, &images, None).is_ok());
            let client = TcpStream::connect(address).expect("it listens");
            // It may hang up at any word.
            let _ = (&client).write_all(&sent);
            let _ = client.shutdown(std::net::Shutdown::Write);
            server.join().expect("the server ends with a result");
        });
    }
}
