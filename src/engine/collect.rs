//! Reading a stopped container: the kernel's state in, plain values out. Touches no disk.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use libc::{c_int, pid_t};

use super::freeze::{Frozen, Task};
use super::mappings::Mappings;
use super::res::fd::{self, Collected, FdFacts, ghost, lock, pipe, tty, unix};
use super::res::mm;
use super::res::task::{creds, regs, sched, seccomp, signals, thread, timers};
use super::res::{sysv, tmpfs};
use super::tree::{Alive, Process, Tree};
use super::{Error, Result, Subject, Why, checks};
use crate::image::records::core::{
    CoreEntry, March, TaskCoreEntry, TaskKobjIdsEntry, TaskRlimitsEntry, ThreadCoreEntry, task_state,
};
use crate::image::records::files::{FdTypes, FdinfoEntry, FileEntry, RegFileEntry};
use crate::image::records::inventory::{IMG_VERSION, InventoryEntry, PstreeEntry};
use crate::image::records::lmrun::{LMRUN_VERSION, LmrunEntry, LmrunHost, LmrunTask, LmrunThread};
use crate::image::records::ns::{TimensEntry, Timespec, UtsnsEntry};
use crate::image::records::task::{FsEntry, RlimitEntry, SeccompEntry, SignalQueueEntry, TaskTimersEntry};
use crate::sys::mem::Memory;
use crate::sys::pidfd::{self, PidFd};
use crate::sys::proc::{self, Mount};
use crate::sys::{clock, file, namespace};
use crate::tracee::batch::Batch;
use crate::tracee::borrow;
use crate::tracee::{Thread, with_first_call};

/// How much of a container is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Processes, mappings and regular files: what a standby follows.
    Memory,
    /// All there is, to see whether it can be carried; but what is on its way (in queues of sockets) may have come or gone a
    /// moment later, and is neither read nor refused.
    Kinds,
    /// All there is.
    Whole { keep_established: bool },
}

/// A descriptor of a puppet.
#[derive(Debug, Clone, Copy)]
pub struct Remote {
    pub fd: c_int,
}

/// What tells most open file descriptions apart: link, offset, flags.
type Looks = (Vec<u8>, u64, u32);
/// A descriptor of a description: host pid, number, and the file's id.
type Holder = (pid_t, c_int, u32);

/// The container's open files, each with its id.
#[derive(Debug)]
pub struct Files {
    pub all: Collected,
    /// Open file descriptions seen: by what tells them apart cheaply, the descriptors to compare with.
    seen: HashMap<Looks, Vec<Holder>>,
    /// Files that only a path is known of: mapped ones, programs, directories.
    paths: HashMap<(Vec<u8>, u32), u32>,
    /// Duplicates of the sockets that are read late, by file id.
    pub sockets: BTreeMap<u32, OwnedFd>,
}

impl Files {
    pub fn new(subject: &Subject, mounts: &[Mount], depth: Depth) -> Result<Files> {
        let init = subject.init;
        let root = std::fs::File::open(format!("/proc/{init}/root")).map_err(|e| Error::proc(init, e))?;
        let all = Collected {
            mounts: mounts.iter().map(|m| (m.id, m.point.clone())).collect(),
            root: root.into(),
            external: subject.external.iter().map(|l| l.clone().into_bytes()).collect(),
            depth,
            files: Vec::new(),
            pipe_data: Vec::new(),
            socket_queues: Vec::new(),
            locks: lock::Seen::default(),
            ghosts: ghost::Found::default(),
            terminal: None,
            watched: Default::default(),
            socket_extras: Vec::new(),
            pipes: BTreeMap::new(),
            unix: unix::Seen::of(init),
        };
        Ok(Files { all, seen: HashMap::new(), paths: HashMap::new(), sockets: BTreeMap::new() })
    }

    fn next_id(&self) -> u32 {
        self.all.files.len() as u32 + 1
    }

    /// The id and type of the open file description behind a descriptor.
    fn descriptor(&mut self, f: FdFacts, process: u32) -> Result<(u32, FdTypes)> {
        let key = (f.link.clone(), f.info.pos, f.flags());
        for (pid, other, id) in self.seen.get(&key).into_iter().flatten() {
            let same = pidfd::same_file((f.pid, f.fd), (*pid, *other)).map_err(|e| Error::proc(f.pid, e))?;
            if same {
                lock::collect(&f, *id, process, &mut self.all.locks)?;
                return Ok((*id, self.type_of(*id)));
            }
        }
        let id = self.next_id();
        let entry = fd::dump(&f, id, &mut self.all)?;
        self.all.files.push(entry);
        lock::collect(&f, id, process, &mut self.all.locks)?;
        self.seen.entry(key).or_default().push((f.pid, f.fd, id));
        if self.type_of(id) == FdTypes::Inetsk {
            self.sockets.insert(id, f.dup);
        }
        Ok((id, self.type_of(id)))
    }

    fn type_of(&self, id: u32) -> FdTypes {
        FdTypes::try_from(self.all.files[id as usize - 1].r#type).unwrap_or(FdTypes::Und)
    }

    /// The id of a mapped file that has no name any more; `name` was its last.
    pub fn nameless(&mut self, name: &[u8], flags: u32, mapped: OwnedFd) -> std::io::Result<u32> {
        let stat = file::stat(&mapped)?;
        // Its number keeps it apart from others that had the same name.
        let number = self.all.ghosts.known(&stat).unwrap_or(u32::MAX);
        if let Some(known) = self.paths.get(&([name, &number.to_ne_bytes()].concat(), flags)) {
            return Ok(*known);
        }
        let id = self.next_id();
        self.all.ghosts.add(id, &mapped)?;
        let number = self.all.ghosts.known(&stat).unwrap_or(u32::MAX);
        let reg = RegFileEntry { id, flags, name: name.to_vec(), mode: Some(stat.mode), ..RegFileEntry::default() };
        self.all.files.push(FileEntry { r#type: FdTypes::Reg as i32, id, reg: Some(reg), ..FileEntry::default() });
        self.paths.insert(([name, &number.to_ne_bytes()].concat(), flags), id);
        Ok(id)
    }

    /// The id of a file that is known by its path in the container.
    pub fn by_path(&mut self, name: &[u8], flags: u32, mode: u32, size: Option<u64>) -> u32 {
        let id = self.next_id();
        if let Some(known) = self.paths.get(&(name.to_vec(), flags)) {
            return *known;
        }
        let reg = RegFileEntry {
            id,
            flags,
            name: name.to_vec(),
            mode: Some(mode),
            size: size.filter(|_| mode & libc::S_IFMT == libc::S_IFREG),
            ..RegFileEntry::default()
        };
        self.all.files.push(FileEntry { r#type: FdTypes::Reg as i32, id, reg: Some(reg), ..FileEntry::default() });
        self.paths.insert((name.to_vec(), flags), id);
        id
    }

    /// The id of what a link below `/proc/PID` leads to: `exe`, `cwd` or `root`.
    pub fn by_link(&mut self, pid: pid_t, link: &str, flags: u32) -> Result<u32> {
        let path = proc::link(pid, link).map_err(|e| Error::proc(pid, e))?;
        let path = path.as_bytes();
        let real =
            std::fs::File::open(format!("/proc/{pid}/{link}")).and_then(file::stat).map_err(|e| Error::proc(pid, e))?;
        let there = file::open_in(&self.all.root, path, libc::O_PATH as u32).and_then(file::stat);
        if !there.is_ok_and(|s| s.is_same_file(&real)) {
            let why = format!("its {link}, {}, is not at that path any more", String::from_utf8_lossy(path));
            return Err(Error::refused(pid, Why::Other { why, remedy: "put it back, or restart the program" }));
        }
        Ok(self.by_path(path, flags, real.mode, None))
    }
}

/// A stopped process on this host.
#[derive(Debug)]
pub struct Host {
    pub pid: pid_t,
    /// Pid inside the container.
    pub inside: u32,
    pub memory: Memory,
}

/// A collected container: what is written, and how to reach the memory that goes with it.
#[derive(Debug)]
pub struct Collection {
    pub tree: Tree,
    pub files: Files,
    /// One per process that lives, in the order of the tree.
    pub hosts: Vec<Host>,
    /// Where its own tmpfs mounts are.
    pub tmpfs: Vec<PathBuf>,
}

impl Collection {
    /// Moves what was found of files into the tree, when nothing more is to be found.
    pub fn take_records(&mut self) {
        let found = &mut self.files.all;
        self.tree.files = std::mem::take(&mut found.files);
        self.tree.pipe_data = std::mem::take(&mut found.pipe_data);
        self.tree.socket_queues = std::mem::take(&mut found.socket_queues);
    }
}

/// Reads everything but pages and the queues of TCP connections.
pub fn collect(frozen: &Frozen, subject: &Subject, mappings: &Mappings, depth: Depth) -> Result<Collection> {
    checks::namespaces(frozen)?;
    checks::sharing(frozen)?;
    checks::strangers(frozen)?;
    let mut mounts = mounts(subject.init)?;
    let sysv = if checks::ipc(subject.init)? { sysv::collect(subject.init)? } else { Vec::new() };
    let mut files = Files::new(subject, &mounts, depth)?;
    let host: HashSet<String> = self::mounts(std::process::id() as pid_t)?.into_iter().map(|m| m.device).collect();
    mounts.retain(|m| !host.contains(&m.device));
    checks::mounts(subject, &mounts)?;
    let mut seccomp = SeccompEntry::default();
    let (mut processes, mut hosts) = (Vec::new(), Vec::new());
    let inside = checks::pids(frozen)?;
    for (index, task) in frozen.tasks.iter().enumerate() {
        let entry = pstree_entry(task, &inside)?;
        if task.is_zombie() {
            processes.push(zombie(task, entry)?);
            continue;
        }
        let (process, host) = process(task, entry, index as u32 + 1, mappings, &mut files, &mut seccomp)?;
        processes.push(process);
        hosts.push(host);
    }
    let living = processes.iter().filter(|p| p.alive.is_some());
    sysv::check(hosts.iter().map(|h: &Host| h.pid).zip(living), &sysv)?;
    pipe::finish(&mut files.all)?;
    unix::finish(&mut files.all)?;
    let root_ids = processes.first().and_then(|p| p.alive.as_ref()).map(|a| a.ids.clone());
    let tasks = processes.iter().filter_map(|p| p.alive.as_ref()).map(|a| a.extra.clone()).collect();
    let sockets = std::mem::take(&mut files.all.socket_extras);
    let terminals = files.all.terminal.take().map(|t| tty::info(&t, &inside)).transpose()?.into_iter().collect();
    let locks = std::mem::take(&mut files.all.locks.records);
    let tree = Tree {
        inventory: InventoryEntry {
            img_version: IMG_VERSION,
            fdinfo_per_id: Some(true),
            root_ids,
            ns_per_id: Some(true),
            lsmtype: Some(0),
            dump_uptime: Some((clock::boottime() / 1000) as u64),
            ..InventoryEntry::default()
        },
        extra: LmrunEntry { version: LMRUN_VERSION, host: host_facts(), tasks, sockets, ..LmrunEntry::default() },
        processes,
        files: Vec::new(),
        pipe_data: Vec::new(),
        socket_queues: Vec::new(),
        streams: BTreeMap::new(),
        seccomp,
        locks,
        terminals,
        sysv,
        time: clocks(subject.init)?,
        uts: uts(subject.init)?,
    };
    Ok(Collection { tree, files, hosts, tmpfs: tmpfs::points(&mounts) })
}

fn mounts(pid: pid_t) -> Result<Vec<Mount>> {
    proc::mounts(pid).map_err(|e| Error::proc(pid, e))
}

fn pstree_entry(task: &Task, inside: &HashMap<pid_t, u32>) -> Result<PstreeEntry> {
    let status = proc::status(task.pid).map_err(|e| Error::proc(task.pid, e))?;
    let id = |field| status.innermost(field).map_err(|e| Error::proc(task.pid, e));
    let pid = inside[&task.pid];
    Ok(PstreeEntry {
        pid,
        ppid: task.parent.and_then(|p| inside.get(&p)).copied().unwrap_or(0),
        pgid: id("NSpgid")?,
        sid: id("NSsid")?,
        threads: vec![pid],
    })
}

fn zombie(task: &Task, entry: PstreeEntry) -> Result<Process> {
    let stat = proc::stat(task.pid).map_err(|e| Error::proc(task.pid, e))?;
    let tc = TaskCoreEntry {
        task_state: task_state::DEAD,
        exit_code: stat.exit_code,
        comm: thread::collect_name(task.pid)?,
        ..TaskCoreEntry::default()
    };
    // They decide who may see how it ended.
    let status = proc::status(task.pid).map_err(|e| Error::proc(task.pid, e))?;
    let creds = creds::record(&status, 0).map_err(|e| Error::proc(task.pid, e))?;
    let thread_core = Some(ThreadCoreEntry { creds: Some(creds), ..ThreadCoreEntry::default() });
    let core = CoreEntry { mtype: March::X8664 as i32, tc: Some(tc), thread_core, ..CoreEntry::default() };
    Ok(Process { entry, cores: vec![core], alive: None })
}

/// What is read of a thread without its help.
struct Outside {
    core: ThreadCoreEntry,
    extra: LmrunThread,
    status: proc::Status,
    xstate: Vec<u8>,
    /// Where to go on when stopped inside a restartable sequence.
    abort: Option<u64>,
    /// A signal waits that will run a handler.
    signalled: bool,
}

fn outside(t: &Thread, shared: &SignalQueueEntry, memory: &Memory, all: &mut SeccompEntry) -> Result<Outside> {
    let status = proc::status(t.tid).map_err(|e| Error::proc(t.tid, e))?;
    let mut core = ThreadCoreEntry { blk_sigset: Some(t.mask), ..ThreadCoreEntry::default() };
    let tid = status.innermost("NSpid").map_err(|e| Error::proc(t.tid, e))?;
    let mut extra = LmrunThread { tid, ..LmrunThread::default() };
    let abort = thread::collect(t, memory, &mut core)?;
    sched::collect(t.tid, &mut core, &mut extra)?;
    let mode = status.number("Seccomp").map_err(|e| Error::proc(t.tid, e))?;
    seccomp::collect(t.tid, mode, &mut core, all)?;
    core.comm = Some(thread::collect_name(t.tid)?);
    let pending = signals::collect_pending(t.tid, false)?;
    let signalled = signals::is_signalled(&pending, shared, t.mask);
    core.signals_p = Some(pending);
    let xstate = regs::collect_xstate(t)?;
    extra.xsave = Some(xstate.clone());
    Ok(Outside { core, extra, status, xstate, abort, signalled })
}

/// A thread as it continues here: inside a restartable sequence, at its abort handler, as the kernel itself would have it.
fn continued(t: &Thread, abort: Option<u64>) -> Thread {
    let mut t = t.clone();
    if let Some(rip) = abort {
        t.regs.rip = rip;
    }
    t
}

/// Where a thread's answers to a batch will be.
struct AskedThread {
    thread: thread::Asked,
    stack: u64,
    creds: usize,
}

fn ask_thread(b: &mut Batch) -> AskedThread {
    AskedThread { thread: thread::ask(b), stack: signals::ask_stack(b), creds: creds::ask(b) }
}

fn process(
    task: &Task,
    mut entry: PstreeEntry,
    number: u32,
    mappings: &Mappings,
    files: &mut Files,
    filters: &mut SeccompEntry,
) -> Result<(Process, Host)> {
    let pid = task.pid;
    let io = |e| Error::proc(pid, e);
    let memory = Memory::open(pid).map_err(io)?;
    let vmas = mappings.read(pid).map_err(io)?;
    let shared_pending = signals::collect_pending(pid, true)?;
    let mut known = Vec::new();
    for t in &task.threads {
        known.push(outside(t, &shared_pending, &memory, filters)?);
    }
    entry.threads = known.iter().map(|o| o.extra.tid).collect();
    let guards = mm::guard_regions(pid, &vmas)?;
    let (fds, fs) = open_files(pid, entry.pid, files)?;

    // From here to `give_back` the process is borrowed: only what it alone can tell.
    let loans: Vec<_> = task.threads.iter().zip(&known).map(|(t, o)| (continued(t, o.abort), o.signalled)).collect();
    let mut own = borrow::Process::take(pid, &loans, &vmas, &memory)?;
    let mut batch = Batch::new(own.space());
    let actions = signals::ask_actions(&mut batch);
    let timers_asked = timers::ask(pid, &mut batch)?;
    let mm_asked = mm::ask(&mut batch);
    let subreaper_at = ask_subreaper(&mut batch);
    let membarrier = ask_membarrier(&mut batch);
    let leader = ask_thread(&mut batch);
    own.run(0, &mut batch)?;
    let actions = signals::answer_actions(actions, own.memory()).map_err(io)?;
    let timers: TaskTimersEntry = timers::answer(timers_asked, pid, &batch, own.memory())?;
    let subreaper = own.memory().read_u64(subreaper_at).map_err(io)? as u32 != 0;
    let mut cores = Vec::new();
    let mut answer = |own: &borrow::Process, index: usize, asked: AskedThread, b: &Batch| -> Result<()> {
        let o = &mut known[index];
        let (tid_address, parent_death) = thread::answer(asked.thread, own.memory()).map_err(io)?;
        o.core.pdeath_sig = Some(parent_death);
        o.core.sas = Some(signals::answer_stack(asked.stack, own.memory()).map_err(io)?);
        o.core.creds = Some(creds::answer(asked.creds, &o.status, b).map_err(io)?);
        let thread = with_first_call(&task.threads[index], own.memory());
        let info = regs::record(&thread, &o.xstate, tid_address, o.signalled, o.abort)?;
        cores.push(CoreEntry {
            mtype: March::X8664 as i32,
            thread_info: Some(info),
            thread_core: Some(o.core.clone()),
            ..CoreEntry::default()
        });
        Ok(())
    };
    answer(&own, 0, leader, &batch)?;
    for index in 1..task.threads.len() {
        let mut b = Batch::new(own.space());
        let asked = ask_thread(&mut b);
        own.run(index, &mut b)?;
        answer(&own, index, asked, &b)?;
    }
    own.give_back()?;

    let leader_status = &known[0].status;
    cores[0].tc = Some(TaskCoreEntry {
        task_state: if task.stopped.is_some() { task_state::STOPPED } else { task_state::ALIVE },
        personality: personality(pid)?,
        blk_sigset: task.threads[0].mask,
        comm: thread::collect_name(pid)?,
        timers: Some(timers),
        rlimits: Some(rlimits(pid)?),
        signals_s: Some(shared_pending),
        oom_score_adj: Some(oom_score_adj(pid)?),
        sigactions: actions,
        child_subreaper: Some(subreaper),
        stop_signo: task.stopped.map(|s| s as u32),
        membarrier_registration_mask: membarrier_mask(membarrier, &batch),
        ..TaskCoreEntry::default()
    });
    let umask = leader_status.numbers("Umask", 8).map_err(io)?.first().map(|u| *u as u32);
    let extra =
        LmrunTask { pid: entry.pid, threads: known.into_iter().map(|o| o.extra).collect(), guard_regions: guards };
    let alive = Alive {
        mm: mm::answer(mm_asked, pid, &vmas, &batch, files)?,
        ids: ids(number),
        fs: FsEntry { umask, ..fs },
        fds,
        extra,
    };
    let host = Host { pid, inside: entry.pid, memory };
    Ok((Process { entry, cores, alive: Some(alive) }, host))
}

fn open_files(pid: pid_t, process: u32, files: &mut Files) -> Result<(Vec<FdinfoEntry>, FsEntry)> {
    let pidfd = PidFd::open(pid).map_err(|e| Error::proc(pid, e))?;
    let mut fds = Vec::new();
    for fd in proc::descriptors(pid).map_err(|e| Error::proc(pid, e))? {
        if files.all.depth == Depth::Memory && !is_path(pid, fd) {
            continue;
        }
        let facts = FdFacts::collect(&pidfd, pid, fd)?;
        let close_on_exec = facts.info.flags & libc::O_CLOEXEC as u32 != 0;
        let (id, kind) = files.descriptor(facts, process)?;
        // FD_CLOEXEC is the only flag of a descriptor.
        fds.push(FdinfoEntry {
            id,
            flags: close_on_exec.into(),
            r#type: kind as i32,
            fd: fd as u32,
            ..FdinfoEntry::default()
        });
    }
    let directory = (libc::O_PATH | libc::O_DIRECTORY) as u32;
    let fs = FsEntry {
        cwd_id: files.by_link(pid, "cwd", directory)?,
        root_id: files.by_link(pid, "root", directory)?,
        umask: None,
    };
    Ok((fds, fs))
}

/// Whether a descriptor may be of a regular file.
fn is_path(pid: pid_t, fd: c_int) -> bool {
    proc::link(pid, &format!("fd/{fd}"))
        .is_ok_and(|link| link.as_bytes().starts_with(b"/") && !link.as_bytes().starts_with(b"/dev/"))
}

/// No process shares any of these with another; namespaces are the container's, one of each kind.
fn ids(number: u32) -> TaskKobjIdsEntry {
    TaskKobjIdsEntry {
        vm_id: number,
        files_id: number,
        fs_id: number,
        sighand_id: number,
        pid_ns_id: Some(1),
        net_ns_id: Some(2),
        ipc_ns_id: Some(3),
        uts_ns_id: Some(4),
        mnt_ns_id: Some(5),
        user_ns_id: Some(6),
        cgroup_ns_id: Some(7),
        time_ns_id: Some(8),
    }
}

fn ask_subreaper(b: &mut Batch) -> u64 {
    let room = b.room(8);
    b.call("prctl(PR_GET_CHILD_SUBREAPER)", libc::SYS_prctl, [libc::PR_GET_CHILD_SUBREAPER.into(), room.into()]);
    room
}

/// membarrier(2), since 6.3.
fn ask_membarrier(b: &mut Batch) -> usize {
    const MEMBARRIER_CMD_GET_REGISTRATIONS: i32 = 1 << 9;
    b.attempt("membarrier", libc::SYS_membarrier, [MEMBARRIER_CMD_GET_REGISTRATIONS.into(), 0.into(), 0.into()])
}

fn membarrier_mask(asked: usize, b: &Batch) -> Option<u32> {
    u32::try_from(b.result(asked)).ok()
}

fn personality(pid: pid_t) -> Result<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/personality")).map_err(|e| Error::proc(pid, e))?;
    Ok(u32::from_str_radix(text.trim(), 16).unwrap_or(0))
}

fn oom_score_adj(pid: pid_t) -> Result<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).map_err(|e| Error::proc(pid, e))?;
    Ok(text.trim().parse().unwrap_or(0))
}

fn rlimits(pid: pid_t) -> Result<TaskRlimitsEntry> {
    let limits = proc::limits(pid).map_err(|e| Error::proc(pid, e))?;
    Ok(TaskRlimitsEntry { rlimits: limits.into_iter().map(|l| RlimitEntry { cur: l.soft, max: l.hard }).collect() })
}

pub(super) fn host_facts() -> LmrunHost {
    let uname = nix::sys::utsname::uname().ok();
    let text = |f: fn(&nix::sys::utsname::UtsName) -> &std::ffi::OsStr| {
        uname.as_ref().map_or_else(String::new, |u| f(u).to_string_lossy().into_owned())
    };
    LmrunHost {
        kernel_release: text(|u| u.release()),
        machine: text(|u| u.machine()),
        realtime: Some(clock::realtime() as u64),
        ..LmrunHost::default()
    }
}

/// What the container's clocks show now: this host's, shifted by its time namespace.
fn clocks(init: pid_t) -> Result<TimensEntry> {
    let shift = clock::shift_of(init).map_err(|e| Error::proc(init, e))?;
    let timespec = |ns: i128| Timespec { tv_sec: (ns / clock::NANOS) as u64, tv_nsec: (ns % clock::NANOS) as u64 };
    Ok(TimensEntry {
        monotonic: timespec(clock::monotonic() + shift.monotonic),
        boottime: timespec(clock::boottime() + shift.boottime),
    })
}

fn uts(init: pid_t) -> Result<UtsnsEntry> {
    let (nodename, domainname) = namespace::uts_names(init).map_err(|e| Error::proc(init, e))?;
    Ok(UtsnsEntry { nodename, domainname })
}
