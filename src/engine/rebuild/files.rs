//! Giving puppets their files: we open each once, they receive and place them.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use super::{Built, Site, built};
use crate::engine::collect::Remote;
use crate::engine::res::fd::{self, lock, tty};
use crate::engine::tree::Alive;
use crate::engine::{Error, Result};
use crate::image::records::files::FdTypes;
use crate::sys::fdpass;
use crate::tracee::batch::Arg;

/// CMSG_LEN of that many descriptors: a header of 16 bytes and 4 for each.
fn control_len(count: usize) -> usize {
    16 + 4 * count
}

impl Built {
    /// Prepares a first puppet, whose end of the control socket is descriptor 0: moves it to `parking`, with nothing else open.
    pub fn settle(&mut self, parking: i32) -> Result<()> {
        const RLIMIT_NOFILE: u64 = 7;
        let limits = crate::sys::proc::limits(self.pid).map_err(|e| Error::proc(self.pid, e))?;
        let hard = limits[RLIMIT_NOFILE as usize].hard;
        let mut b = self.main.batch();
        let new = b.bytes(&[hard.to_ne_bytes(), hard.to_ne_bytes()].concat());
        b.call("prlimit64", libc::SYS_prlimit64, [0.into(), RLIMIT_NOFILE.into(), new.into(), 0.into()]);
        let duplicate = [0.into(), libc::F_DUPFD_CLOEXEC.into(), parking.into()];
        b.call("fcntl(F_DUPFD_CLOEXEC)", libc::SYS_fcntl, duplicate);
        self.main.run(&self.memory, &mut b)?;
        self.forget_parked(parking)?;
        self.main.call("close_range", libc::SYS_close_range, [0, parking as u64 - 1, 0])?;
        Ok(())
    }

    /// Closes all that was parked above the control socket.
    pub fn forget_parked(&mut self, parking: i32) -> Result<()> {
        self.main.call("close_range", libc::SYS_close_range, [parking as u64 + 1, u64::from(u32::MAX), 0])?;
        Ok(())
    }

    /// Sends descriptors; they are parked above the control socket, in order. Below it nothing may be open yet that
    /// is to stay.
    pub fn deliver(&mut self, control: &UnixStream, parking: i32, fds: &[BorrowedFd<'_>]) -> Result<Vec<Remote>> {
        let mut parked = Vec::new();
        for some in fds.chunks(fdpass::MAX_FDS) {
            fdpass::send(control.as_fd(), &[0], some).map_err(Error::system("send descriptors to a puppet"))?;
            let mut b = self.main.batch();
            let byte = b.room(8);
            let iov = b.bytes(&[byte, 1].map(u64::to_ne_bytes).concat());
            let len = control_len(some.len()).next_multiple_of(8);
            let rights = b.room(len);
            // struct msghdr: name, its length, iovec, their number, control, its length, flags
            let header = b.bytes(&[0, 0, iov, 1, rights, len as u64, 0].map(u64::to_ne_bytes).concat());
            let args = [parking.into(), header.into(), libc::MSG_CMSG_CLOEXEC.into()];
            b.call("recvmsg", libc::SYS_recvmsg, args);
            self.main.run(&self.memory, &mut b)?;
            let raw = self.memory.read_vec(rights, control_len(some.len())).map_err(|e| Error::proc(self.pid, e))?;
            if raw[..8] != (control_len(some.len()) as u64).to_ne_bytes() {
                return Err(Error::BadRecord {
                    what: "a puppet did not receive all its descriptors; is RLIMIT_NOFILE too low?".into(),
                });
            }
            let mut b = self.main.batch();
            for fd in raw[16..].chunks_exact(4).map(|c| i32::from_ne_bytes(c.try_into().expect("four bytes"))) {
                let args = [fd.into(), libc::F_DUPFD_CLOEXEC.into(), (parking + 1).into()];
                b.call("fcntl(F_DUPFD_CLOEXEC)", libc::SYS_fcntl, args);
            }
            b.call("close_range", libc::SYS_close_range, [0.into(), (parking - 1).into(), 0.into()]);
            self.main.run(&self.memory, &mut b)?;
            parked.extend((0..some.len()).map(|i| Remote { fd: b.result(i) as i32 }));
        }
        Ok(parked)
    }
}

impl Site {
    /// Opens a recorded file, once.
    pub fn open(&mut self, id: u32) -> Result<()> {
        if self.files.contains_key(&id) {
            return Ok(());
        }
        let entry = self.plan.tree.files.iter().find(|f| f.id == id);
        let entry = entry.ok_or_else(|| Error::BadRecord { what: format!("there is no record of file {id:#x}") })?;
        let fd = fd::create(entry, &mut self.shop)?;
        self.files.insert(id, fd);
        Ok(())
    }
}

/// Gives a process its descriptors and directories.
pub fn place(site: &mut Site, all: &mut BTreeMap<u32, Built>, pid: u32, alive: &Alive) -> Result<()> {
    let built = built(all, pid)?;
    let mut ids: Vec<u32> = alive.fds.iter().map(|f| f.id).chain([alive.fs.cwd_id, alive.fs.root_id]).collect();
    ids.sort_unstable();
    ids.dedup();
    for id in &ids {
        site.open(*id)?;
    }
    built.forget_parked(site.parking)?;
    let fds: Vec<BorrowedFd> = ids.iter().map(|id| site.files[id].as_fd()).collect();
    let parked = built.deliver(&site.control, site.parking, &fds)?;
    let parked = |id: u32| Arg::from(parked[ids.binary_search(&id).expect("all were delivered")].fd);
    let mut b = built.main.batch();
    for f in &alive.fds {
        if !b.fits(8, 64) {
            built.main.run(&built.memory, &mut b)?;
            b = built.main.batch();
        }
        let flags = if f.flags & libc::FD_CLOEXEC as u32 != 0 { libc::O_CLOEXEC } else { 0 };
        b.call("dup3", libc::SYS_dup3, [parked(f.id), f.fd.into(), flags.into()]);
    }
    b.call("fchdir", libc::SYS_fchdir, [parked(alive.fs.root_id)]);
    let here = b.text(b".");
    b.call("chroot", libc::SYS_chroot, [here.into()]);
    b.call("fchdir", libc::SYS_fchdir, [parked(alive.fs.cwd_id)]);
    if let Some(umask) = alive.fs.umask {
        b.call("umask", libc::SYS_umask, [umask.into()]);
    }
    built.main.run(&built.memory, &mut b)?;
    built.forget_parked(site.parking)
}

/// What files need their first holder to do: each once.
pub fn link(site: &mut Site, built: &mut Built, pid: u32, alive: &Alive) -> Result<()> {
    for f in &alive.fds {
        if !site.linked.insert(f.id) {
            continue;
        }
        if let Some(entry) = site.plan.tree.files.iter().find(|e| e.id == f.id) {
            let mut b = built.main.batch();
            fd::link(entry, f.fd as i32, &mut b);
            built.main.run(&built.memory, &mut b)?;
        }
    }
    for terminal in &site.plan.tree.terminals {
        // Only who has it can say who is in its foreground; init has had it from the beginning.
        if let (1, Some(fd)) = (pid, alive.fds.iter().find(|f| f.r#type == FdTypes::Tty as i32)) {
            let mut b = built.main.batch();
            tty::bring_forward(terminal, fd.fd as i32, &mut b);
            built.main.run(&built.memory, &mut b)?;
        }
    }
    for held in site.plan.tree.locks.iter().filter(|held| held.pid == pid.cast_signed()) {
        let mut b = built.main.batch();
        lock::restore(held, &mut b)?;
        built.main.run(&built.memory, &mut b)?;
    }
    Ok(())
}
