//! The terminal that a container was given (`--console-socket`): the slave of a pseudoterminal whose master the engine holds. A
//! restore gives it a new one, set as the old one was. Input that was typed and not read is lost.
//!
//! Pseudoterminals of the container's own, with their masters in it, are refused.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use libc::{c_int, pid_t};
use nix::sys::stat::{major, minor};

use super::{Collected, FdFacts, FdKind, Workshop, part};
use crate::engine::{Error, Result};
use crate::image::records::files::{FdTypes, FileEntry, FownEntry};
use crate::image::records::tty::{TermiosEntry, TtyFileEntry, TtyInfoEntry, TtyPtyEntry, TtyType, WinsizeEntry};
use crate::sys::file::{self, FileStat};
use crate::sys::proc;
use crate::sys::terminal::{self, Modes};
use crate::tracee::batch::Batch;

pub struct Tty;

/// The terminal, as a process has it open.
#[derive(Debug)]
pub struct Seen {
    stat: FileStat,
    link: Vec<u8>,
    dup: OwnedFd,
    pid: pid_t,
}

/// The number of the only terminal's record, and of the name of the standard stream that it is.
const THE_TERMINAL: u32 = 1;

/// include/uapi/linux/major.h: UNIX98_PTY_SLAVE_MAJOR and the seven after it.
fn is_slave(s: &FileStat) -> bool {
    s.kind() == libc::S_IFCHR && (136..144).contains(&major(s.rdev))
}

/// `/dev/tty`: whatever terminal the session has.
fn is_own(s: &FileStat) -> bool {
    s.kind() == libc::S_IFCHR && (major(s.rdev), minor(s.rdev)) == (5, 0)
}

/// A device number as `/proc/PID/stat` has it.
fn number(rdev: u64) -> u32 {
    let (major, minor) = (major(rdev) as u32, minor(rdev) as u32);
    (minor & 0xff) | major << 8 | (minor & !0xff) << 12
}

impl FdKind for Tty {
    const NAME: &'static str = "terminal";
    const TYPE: FdTypes = FdTypes::Tty;

    fn claims(f: &FdFacts) -> bool {
        is_slave(&f.stat) || is_own(&f.stat)
    }

    fn dump(f: &FdFacts, id: u32, all: &mut Collected) -> Result<FileEntry> {
        if all.terminal.is_none() && is_slave(&f.stat) && all.external.contains(&f.link) {
            let dup = f.dup.try_clone().map_err(|e| Error::proc(f.pid, e))?;
            all.terminal = Some(Seen { stat: f.stat, link: f.link.clone(), dup, pid: f.pid });
        }
        let known = match &all.terminal {
            Some(t) if is_slave(&f.stat) => (f.stat.dev, f.stat.rdev) == (t.stat.dev, t.stat.rdev),
            Some(t) => proc::stat(f.pid).map_err(|e| Error::proc(f.pid, e))?.terminal == number(t.stat.rdev),
            None => false,
        };
        if !known {
            let why = "is a terminal other than the one that the container was given: it cannot be carried yet";
            return f.refuse(why, "close it before the checkpoint, or stop and start the container instead");
        }
        let record = TtyFileEntry { id, tty_info_id: THE_TERMINAL, flags: f.flags(), fown: f.owner()?, regf_id: None };
        Ok(FileEntry { r#type: Self::TYPE as i32, id, tty: Some(record), ..FileEntry::default() })
    }

    fn create(e: &FileEntry, shop: &mut Workshop) -> Result<OwnedFd> {
        let r = part(e, Self::NAME, e.tty.as_ref())?;
        let info = shop.terminals.iter().find(|t| t.id == r.tty_info_id);
        let info = info.ok_or_else(|| Error::BadRecord { what: "a terminal has no record".into() })?.clone();
        let given = shop.external(&name(&info))?;
        let flags = r.flags & (libc::O_ACCMODE | libc::O_NONBLOCK) as u32 | libc::O_NOCTTY as u32;
        let make = || {
            let fd = file::reopen(&given, flags)?;
            apply(&info, &fd)?;
            Ok(fd)
        };
        make().map_err(Error::system("open the container's terminal"))
    }

    fn link(_: &FileEntry, _: c_int, _: &mut Batch) {}

    fn owner(e: &FileEntry) -> Option<&FownEntry> {
        e.tty.as_ref().map(|r| &r.fown)
    }
}

/// The link by which a terminal was a standard stream.
fn name(info: &TtyInfoEntry) -> Vec<u8> {
    format!("/dev/pts/{}", info.pty.as_ref().map_or(0, |pty| pty.index)).into_bytes()
}

/// The record of the terminal; `inside` knows the pids of the container.
pub fn info(t: &Seen, inside: &HashMap<pid_t, u32>) -> Result<TtyInfoEntry> {
    let io = |e: nix::Error| Error::proc(t.pid, e.into());
    let index =
        std::str::from_utf8(&t.link).ok().and_then(|l| l.strip_prefix("/dev/pts/")).and_then(|n| n.parse().ok());
    let index = index.ok_or_else(|| Error::BadRecord { what: "a terminal that is no pseudoterminal".into() })?;
    let stat = proc::stat(t.pid).map_err(|e| Error::proc(t.pid, e))?;
    let status = proc::status(t.pid).map_err(|e| Error::proc(t.pid, e))?;
    let modes = terminal::modes(&t.dup).map_err(io)?;
    let (rows, columns) = terminal::size(&t.dup).map_err(io)?;
    Ok(TtyInfoEntry {
        id: THE_TERMINAL,
        r#type: TtyType::Pty as i32,
        locked: false,
        exclusive: false,
        packet_mode: false,
        sid: status.innermost("NSsid").map_err(|e| Error::proc(t.pid, e))?,
        pgrp: inside.get(&stat.foreground).copied().unwrap_or(0),
        rdev: number(t.stat.rdev),
        termios: Some(TermiosEntry {
            c_iflag: modes.input,
            c_oflag: modes.output,
            c_cflag: modes.control,
            c_lflag: modes.local,
            c_line: modes.line.into(),
            c_ispeed: modes.input_speed,
            c_ospeed: modes.output_speed,
            c_cc: modes.characters.map(u32::from).to_vec(),
        }),
        termios_locked: None,
        winsize: Some(WinsizeEntry { ws_row: rows.into(), ws_col: columns.into(), ws_xpixel: 0, ws_ypixel: 0 }),
        pty: Some(TtyPtyEntry { index }),
        dev: Some(t.stat.dev as u32),
        uid: None,
        gid: None,
    })
}

fn apply(info: &TtyInfoEntry, fd: impl AsFd) -> std::io::Result<()> {
    if let Some(size) = &info.winsize {
        terminal::set_size(&fd, size.ws_row as u16, size.ws_col as u16)?;
    }
    if let Some(m) = &info.termios {
        let mut characters = [0; 19];
        characters.iter_mut().zip(&m.c_cc).for_each(|(to, from)| *to = *from as u8);
        let modes = Modes {
            input: m.c_iflag,
            output: m.c_oflag,
            control: m.c_cflag,
            local: m.c_lflag,
            line: m.c_line as u8,
            characters,
            input_speed: m.c_ispeed,
            output_speed: m.c_ospeed,
        };
        terminal::set_modes(&fd, &modes)?;
    }
    Ok(())
}

/// Has init put the old process group into the foreground again.
pub fn bring_forward(info: &TtyInfoEntry, fd: c_int, b: &mut Batch) {
    if info.pgrp != 0 {
        let at = b.bytes(&info.pgrp.to_ne_bytes());
        b.attempt("ioctl(TIOCSPGRP)", libc::SYS_ioctl, [fd.into(), libc::TIOCSPGRP.into(), at.into()]);
    }
}
