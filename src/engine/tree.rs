//! A checkpoint as plain values: the records of the images, and which file each belongs in.

use std::collections::BTreeMap;

use super::{Error, Result};
use crate::image::dir::{ImageDir, ImageWriter};
use crate::image::format;
use crate::image::records::core::{CoreEntry, TaskKobjIdsEntry, task_state};
use crate::image::records::files::{FdinfoEntry, FileEntry, FileLockEntry, PipeDataEntry};
use crate::image::records::inventory::{IMG_VERSION, InventoryEntry, PstreeEntry};
use crate::image::records::lmrun::{LMRUN_VERSION, LmrunEntry, LmrunTask, LmrunThread};
use crate::image::records::mm::MmEntry;
use crate::image::records::ns::{IpcShmEntry, TimensEntry, UtsnsEntry};
use crate::image::records::sockets::{SkPacketEntry, TcpStreamEntry};
use crate::image::records::task::{FsEntry, SeccompEntry};
use crate::image::records::tty::TtyInfoEntry;

/// One process. A zombie has its first core alone.
#[derive(Debug, Clone, PartialEq)]
pub struct Process {
    pub entry: PstreeEntry,
    /// One per thread, in the order of `entry.threads`; the leader first.
    pub cores: Vec<CoreEntry>,
    pub alive: Option<Alive>,
}

/// What only a process that lives has.
#[derive(Debug, Clone, PartialEq)]
pub struct Alive {
    pub mm: MmEntry,
    pub ids: TaskKobjIdsEntry,
    pub fs: FsEntry,
    pub fds: Vec<FdinfoEntry>,
    pub extra: LmrunTask,
}

impl Alive {
    pub fn thread(&self, tid: u32) -> Option<&LmrunThread> {
        self.extra.threads.iter().find(|t| t.tid == tid)
    }
}

/// A TCP connection's record with what was received and not read, and sent and not acknowledged.
pub type Stream = (TcpStreamEntry, Vec<u8>);

/// All that a checkpoint holds but pages.
#[derive(Debug, Clone, PartialEq)]
pub struct Tree {
    pub inventory: InventoryEntry,
    pub extra: LmrunEntry,
    /// Parents before their children.
    pub processes: Vec<Process>,
    pub files: Vec<FileEntry>,
    pub pipe_data: Vec<(PipeDataEntry, Vec<u8>)>,
    pub socket_queues: Vec<(SkPacketEntry, Vec<u8>)>,
    /// By inode number of the socket.
    pub streams: BTreeMap<u32, Stream>,
    pub seccomp: SeccompEntry,
    /// File locks.
    pub locks: Vec<FileLockEntry>,
    /// The terminal that the container was given.
    pub terminals: Vec<TtyInfoEntry>,
    /// System V shared memory.
    pub sysv: Vec<IpcShmEntry>,
    pub time: TimensEntry,
    pub uts: UtsnsEntry,
}

impl Tree {
    /// Writes every record; the pages are elsewhere.
    pub fn write(&self, w: &ImageWriter) -> Result<()> {
        let ids = self.inventory.root_ids.as_ref();
        let ns = |id: Option<u32>| u64::from(id.unwrap_or(0));
        for p in &self.processes {
            for (core, tid) in p.cores.iter().zip(&p.entry.threads) {
                w.write(&format::CORE, (*tid).into(), std::slice::from_ref(core))?;
            }
            let Some(alive) = &p.alive else { continue };
            let pid = u64::from(p.entry.pid);
            w.write(&format::MM, pid, std::slice::from_ref(&alive.mm))?;
            w.write(&format::IDS, pid, std::slice::from_ref(&alive.ids))?;
            w.write(&format::FS, pid, std::slice::from_ref(&alive.fs))?;
            w.write(&format::FDINFO, alive.ids.files_id.into(), &alive.fds)?;
        }
        w.write(&format::FILES, 0, &self.files)?;
        w.write_payloads(&format::PIPES_DATA, 0, &self.pipe_data)?;
        w.write_payloads(&format::SK_QUEUES, 0, &self.socket_queues)?;
        for (inode, stream) in &self.streams {
            w.write_payloads(&format::TCP_STREAM, (*inode).into(), std::slice::from_ref(stream))?;
        }
        w.write(&format::SECCOMP, 0, std::slice::from_ref(&self.seccomp))?;
        if !self.locks.is_empty() {
            w.write(&format::FILELOCKS, 0, &self.locks)?;
        }
        if !self.terminals.is_empty() {
            w.write(&format::TTY_INFO, 0, &self.terminals)?;
        }
        if !self.sysv.is_empty() {
            w.write(&format::IPC_SHM, ns(ids.and_then(|i| i.ipc_ns_id)), &self.sysv)?;
        }
        w.write(&format::TIMENS, ns(ids.and_then(|i| i.time_ns_id)), std::slice::from_ref(&self.time))?;
        w.write(&format::UTSNS, ns(ids.and_then(|i| i.uts_ns_id)), std::slice::from_ref(&self.uts))?;
        let entries: Vec<PstreeEntry> = self.processes.iter().map(|p| p.entry.clone()).collect();
        w.write(&format::PSTREE, 0, &entries)?;
        w.write(&format::LMRUN, 0, std::slice::from_ref(&self.extra))?;
        w.write(&format::INVENTORY, 0, std::slice::from_ref(&self.inventory))?;
        Ok(())
    }

    /// Reads every record of a complete checkpoint.
    pub fn read(dir: &ImageDir) -> Result<Tree> {
        let bad = |what: String| Error::BadImage { path: dir.path().to_owned(), what };
        let inventory: InventoryEntry = dir.read_one(&format::INVENTORY, 0)?;
        if inventory.img_version != IMG_VERSION {
            return Err(bad(format!("image version {} is not known", inventory.img_version)));
        }
        if !dir.exists(&format::LMRUN, 0)? {
            return Err(bad("was not made by lmrun: checkpoints of CRIU cannot be restored yet".into()));
        }
        let mut extra: LmrunEntry = dir.read_one(&format::LMRUN, 0)?;
        if extra.version > LMRUN_VERSION {
            return Err(bad(format!("made by a newer lmrun (format {}, known is {LMRUN_VERSION})", extra.version)));
        }
        let mut processes = Vec::new();
        for entry in dir.read_all(&format::PSTREE, 0)? {
            processes.push(read_process(dir, entry, &mut extra)?);
        }
        let root = processes.first().ok_or_else(|| bad("holds no process".into()))?;
        let ids = root.alive.as_ref().map(|a| a.ids.clone()).ok_or_else(|| bad("its init is a zombie".into()))?;
        let files: Vec<FileEntry> = dir.read_all(&format::FILES, 0)?;
        let mut streams = BTreeMap::new();
        for inode in files.iter().filter_map(|f| f.isk.as_ref()).map(|s| s.ino) {
            if let Some(stream) = if_there(dir, &format::TCP_STREAM, inode.into())?.into_iter().next() {
                streams.insert(inode, stream);
            }
        }
        Ok(Tree {
            inventory,
            extra,
            processes,
            files,
            pipe_data: if_there(dir, &format::PIPES_DATA, 0)?,
            socket_queues: if_there(dir, &format::SK_QUEUES, 0)?,
            streams,
            seccomp: dir.read_one(&format::SECCOMP, 0)?,
            locks: if dir.exists(&format::FILELOCKS, 0)? { dir.read_all(&format::FILELOCKS, 0)? } else { Vec::new() },
            terminals: if dir.exists(&format::TTY_INFO, 0)? { dir.read_all(&format::TTY_INFO, 0)? } else { Vec::new() },
            sysv: {
                let id = ids.ipc_ns_id.unwrap_or(0).into();
                if dir.exists(&format::IPC_SHM, id)? { dir.read_all(&format::IPC_SHM, id)? } else { Vec::new() }
            },
            time: dir.read_one(&format::TIMENS, ids.time_ns_id.unwrap_or(0).into())?,
            uts: dir.read_one(&format::UTSNS, ids.uts_ns_id.unwrap_or(0).into())?,
        })
    }
}

fn if_there<T>(dir: &ImageDir, kind: &format::ImageFile<T>, id: u64) -> Result<Vec<(T, Vec<u8>)>>
where
    T: prost::Message + Default + format::Payload,
{
    Ok(if dir.exists(kind, id)? { dir.read_payloads(kind, id)? } else { Vec::new() })
}

fn read_process(dir: &ImageDir, entry: PstreeEntry, extra: &mut LmrunEntry) -> Result<Process> {
    let mut cores: Vec<CoreEntry> = Vec::new();
    for tid in &entry.threads {
        cores.push(dir.read_one(&format::CORE, (*tid).into())?);
    }
    let state = cores.first().and_then(|c| c.tc.as_ref()).map(|tc| tc.task_state);
    let bad = |what: String| Error::BadImage { path: dir.path().to_owned(), what };
    let alive = match state {
        None => return Err(bad(format!("process {} has no state", entry.pid))),
        Some(task_state::DEAD | task_state::ZOMBIE) => None,
        Some(_) => {
            let pid = u64::from(entry.pid);
            let ids: TaskKobjIdsEntry = dir.read_one(&format::IDS, pid)?;
            let at = extra.tasks.iter().position(|t| t.pid == entry.pid);
            let at = at.ok_or_else(|| bad(format!("lmrun.bin knows nothing of process {}", entry.pid)))?;
            Some(Alive {
                mm: dir.read_one(&format::MM, pid)?,
                fs: dir.read_one(&format::FS, pid)?,
                fds: dir.read_all(&format::FDINFO, ids.files_id.into())?,
                ids,
                extra: extra.tasks[at].clone(),
            })
        }
    };
    Ok(Process { entry, cores, alive })
}
