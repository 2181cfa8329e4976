//! Tables of system calls that a task makes by itself, one after the other, without a stop between them.

use std::io;

use libc::{c_long, pid_t};

use super::{At, Error, Result};
use crate::sys::mem::Memory;

/// One entry, as the interpreter in `sys::code` reads it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    nr: u32,
    /// Bit 0: an error ends the batch.
    flags: u8,
    /// 1..=6: that argument is the result of entry `link_entry`; 0: none is.
    link_arg: u8,
    link_entry: u16,
    args: [u64; 6],
    result: i64,
}

pub(super) const ENTRY: u64 = size_of::<Entry>() as u64;
const _: () = assert!(ENTRY == 64);

/// An argument of a remote call.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    Value(u64),
    /// The result of an earlier entry of the same batch. One per entry.
    ResultOf(usize),
}

macro_rules! arg_from {
    ($($t:ty),*) => { $(impl From<$t> for Arg { fn from(v: $t) -> Arg { Arg::Value(v as u64) } })* };
}
arg_from!(u64, i64, u32, i32, usize);

/// Space for a batch inside the task: entries at `table`, what they point to at `data`.
#[derive(Debug, Clone, Copy)]
pub struct Space {
    pub table: u64,
    pub entries: usize,
    pub data: u64,
    pub data_len: usize,
}

/// System calls to be made, and the memory that they point to.
#[derive(Debug)]
pub struct Batch {
    space: Space,
    entries: Vec<Entry>,
    names: Vec<&'static str>,
    data: Vec<u8>,
}

impl Batch {
    pub fn new(space: Space) -> Batch {
        Batch { space, entries: Vec::new(), names: Vec::new(), data: Vec::new() }
    }

    /// Puts `bytes` where the task can read them and returns the address.
    pub fn bytes(&mut self, bytes: &[u8]) -> u64 {
        self.data.resize(self.data.len().next_multiple_of(16), 0);
        let at = self.space.data + self.data.len() as u64;
        self.data.extend_from_slice(bytes);
        at
    }

    /// A C string.
    pub fn text(&mut self, bytes: &[u8]) -> u64 {
        self.bytes(&[bytes, b"\0"].concat())
    }

    /// Zeroed room for a result and returns its address.
    pub fn room(&mut self, len: usize) -> u64 {
        self.bytes(&vec![0; len])
    }

    /// Adds a call that must succeed: if it fails, no later one is made. Returns its index.
    pub fn call<const N: usize>(&mut self, name: &'static str, nr: c_long, args: [Arg; N]) -> usize {
        self.push(name, nr, args, 1)
    }

    /// Adds a call that may fail. Returns its index.
    pub fn attempt<const N: usize>(&mut self, name: &'static str, nr: c_long, args: [Arg; N]) -> usize {
        self.push(name, nr, args, 0)
    }

    fn push<const N: usize>(&mut self, name: &'static str, nr: c_long, args: [Arg; N], flags: u8) -> usize {
        let mut e = Entry { nr: nr as u32, flags, ..Entry::default() };
        for (i, a) in args.into_iter().enumerate() {
            match a {
                Arg::Value(v) => e.args[i] = v,
                Arg::ResultOf(entry) => {
                    debug_assert!(e.link_arg == 0 && entry < self.entries.len());
                    (e.link_arg, e.link_entry) = (i as u8 + 1, entry as u16);
                }
            }
        }
        self.entries.push(e);
        self.names.push(name);
        self.entries.len() - 1
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether `more` further calls with up to `bytes` of data still fit.
    pub fn fits(&self, more: usize, bytes: usize) -> bool {
        self.entries.len() + more < self.space.entries && self.data.len() + bytes + 16 * more <= self.space.data_len
    }

    /// Writes the table; `last` is the entry that runs in the end whatever happened. Returns the latter's address.
    pub(super) fn store(&self, tid: pid_t, memory: &Memory, last: Option<(c_long, [u64; 3])>) -> Result<u64> {
        if !self.fits(1, 0) {
            let what = format!("a batch of {} calls and {} bytes does not fit", self.entries.len(), self.data.len());
            return Err(Error::Unexpected { tid, what });
        }
        let mut table = self.entries.clone();
        if let Some((nr, args)) = last {
            let mut e = Entry { nr: nr as u32, ..Entry::default() };
            e.args[..3].copy_from_slice(&args);
            table.push(e);
        }
        memory.write(self.space.table, &bytes_of(&table)).at(tid, "write a batch")?;
        memory.write(self.space.data, &self.data).at(tid, "write a batch's data")?;
        Ok(self.space.table + self.entries.len() as u64 * ENTRY)
    }

    /// Reads the results; the first call that had to succeed and did not is the error.
    pub(super) fn load(&mut self, tid: pid_t, memory: &Memory) -> Result<()> {
        let mut raw = vec![0; self.entries.len() * ENTRY as usize];
        memory.read(self.space.table, &mut raw).at(tid, "read a batch's results")?;
        for (entry, raw) in self.entries.iter_mut().zip(raw.chunks_exact(ENTRY as usize)) {
            entry.result = i64::from_ne_bytes(raw[56..].try_into().expect("eight bytes"));
        }
        self.check(tid)
    }

    /// The first call that had to succeed and did not is the error.
    pub(super) fn check(&self, tid: pid_t) -> Result<()> {
        match self.entries.iter().zip(&self.names).find(|(e, _)| e.flags & 1 != 0 && e.result < 0) {
            Some((e, name)) => {
                Err(Error::Call { tid, what: name, source: io::Error::from_raw_os_error(-e.result as i32) })
            }
            None => Ok(()),
        }
    }

    /// A call with its link resolved, for who makes the calls one at a time.
    pub(super) fn resolved(&self, index: usize) -> (c_long, [u64; 6]) {
        let e = &self.entries[index];
        let mut args = e.args;
        if e.link_arg > 0 {
            args[e.link_arg as usize - 1] = self.entries[e.link_entry as usize].result as u64;
        }
        (c_long::from(e.nr), args)
    }

    /// Notes the result of a call that was made by itself; false: no later one may be made.
    pub(super) fn record(&mut self, index: usize, result: i64) -> bool {
        let e = &mut self.entries[index];
        e.result = result;
        e.flags & 1 == 0 || result >= 0
    }

    /// The result of a call, after the batch ran.
    pub fn result(&self, index: usize) -> i64 {
        self.entries[index].result
    }

    pub(super) fn table(&self) -> u64 {
        self.space.table
    }
}

fn bytes_of(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(entries.len() * ENTRY as usize);
    for e in entries {
        out.extend_from_slice(&e.nr.to_ne_bytes());
        out.extend_from_slice(&[e.flags, e.link_arg]);
        out.extend_from_slice(&e.link_entry.to_ne_bytes());
        e.args.iter().for_each(|a| out.extend_from_slice(&a.to_ne_bytes()));
        out.extend_from_slice(&e.result.to_ne_bytes());
    }
    out
}
