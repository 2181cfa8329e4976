//! Images that CRIU 4.2 wrote of a small container with one of nearly everything: each decodes
//! without a byte left over and encodes to the same bytes.

use std::fs;
use std::path::PathBuf;

use prost::Message;

use super::dir::{ImageDir, ImageWriter};
use super::format::*;
use super::page_source::page_extents;
use super::pages::{PAGE_SIZE, PagesOf};
use super::records::files::{FdTypes, GhostFileEntry};
use super::records::ns::{IpcMsg, IpcMsgEntry, IpcSemEntry};
use super::scratch::Scratch;

fn directory() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src/image/testdata/criu-4.2"))
}

/// CRIU's images, and copies of them that are made along the way.
struct Both {
    theirs: ImageDir,
    ours: ImageWriter,
    _scratch: Scratch,
}

impl Both {
    fn new() -> Self {
        let scratch = Scratch::new();
        let ours = ImageWriter::create(&scratch.path().join("copy"), None).unwrap();
        Self { theirs: ImageDir::open(&directory()).unwrap(), ours, _scratch: scratch }
    }

    fn records<T: Message + Default>(&self, kind: &ImageFile<T>, id: u64) -> Vec<T> {
        let records = self.theirs.read_all(kind, id).unwrap();
        self.ours.write(kind, id, &records).unwrap();
        self.compare(&kind.name(id));
        assert!(!records.is_empty());
        records
    }

    fn payloads<T: Message + Default + Payload>(&self, kind: &ImageFile<T>, id: u64) -> Vec<Vec<u8>> {
        let records = self.theirs.read_payloads(kind, id).unwrap();
        self.ours.write_payloads(kind, id, &records).unwrap();
        self.compare(&kind.name(id));
        records.into_iter().map(|record| record.1).collect()
    }

    fn compare(&self, name: &str) {
        let read = |dir: &std::path::Path| fs::read(dir.join(name)).unwrap();
        assert!(read(self.theirs.path()) == read(self.ours.path()), "{name}");
    }
}

#[test]
fn every_record_comes_back_byte_for_byte() {
    let both = Both::new();
    both.records(&INVENTORY, 0);
    both.records(&IDS, 1);
    both.records(&MM, 1);
    both.records(&FS, 1);
    both.records(&FDINFO, 2);
    both.records(&SECCOMP, 0);
    both.records(&REMAP_FPATH, 0);
    both.records(&MEMFD, 0);
    both.records(&FILELOCKS, 0);
    both.records(&TTY_INFO, 0);
    both.records(&TTY_DATA, 0);
    both.records(&IPC_VAR, 11);
    both.records(&IPC_SHM, 11);
    both.records(&MOUNTPOINTS, 13);
    both.records(&UTSNS, 12);
    both.records(&TIMENS, 0);
    both.records(&NETNS, 10);
    both.records(&NETDEV, 10);
    both.records(&STATS_DUMP, 0);

    let tree = both.records(&PSTREE, 0);
    assert_eq!(tree.iter().map(|p| (p.pid, p.threads.len())).collect::<Vec<_>>(), [(1, 2), (15, 1), (16, 1)]);
    let core = both.records(&CORE, 1).remove(0);
    assert_eq!(core.tc.unwrap().sigactions.len(), 62);
    let files = both.records(&FILES, 0);
    let kinds = |kind: FdTypes| files.iter().filter(|file| file.r#type() == kind).count();
    assert_eq!((kinds(FdTypes::Eventfd), kinds(FdTypes::Inetsk), kinds(FdTypes::Eventpoll)), (1, 4, 1));
}

#[test]
fn bytes_that_follow_records_are_found() {
    let both = Both::new();
    assert_eq!(both.payloads(&PIPES_DATA, 0), [b"hello pipe"]);
    assert_eq!(both.payloads(&FIFO_DATA, 0), [b"fifo"]);
    assert_eq!(both.payloads(&SK_QUEUES, 0), [b"queued"]);
    assert_eq!(both.payloads(&TCP_STREAM, 0x2ae9c).len(), 1);

    let mut ghost = both.theirs.records(&GHOST_FILE, 1).unwrap();
    ghost.record::<GhostFileEntry>().unwrap().unwrap();
    assert_eq!(ghost.raw(ghost.left()).unwrap(), b"ghostly");

    let mut queue = both.theirs.records(&IPC_MSG, 11).unwrap();
    assert_eq!(queue.record::<IpcMsgEntry>().unwrap().unwrap().qnum, 1);
    let message: IpcMsg = queue.record().unwrap().unwrap();
    assert_eq!(
        (message.mtype, queue.raw(message.msize.next_multiple_of(8).into()).unwrap()),
        (3, b"message\0".to_vec())
    );
    assert_eq!(queue.left(), 0);

    let mut set = both.theirs.records(&IPC_SEM, 11).unwrap();
    assert_eq!(set.record::<IpcSemEntry>().unwrap().unwrap().nsems, 3);
    assert_eq!(set.left(), 8);
}

#[test]
fn pages_are_found() {
    let dir = ImageDir::open(&directory()).unwrap();
    let mut starts = Vec::new();
    for id in [0, 85, 87] {
        let extents = page_extents(&dir, PagesOf::Shmem(id)).unwrap();
        assert_eq!(extents.len(), 1);
        let mut page = [0; PAGE_SIZE as usize];
        std::os::unix::fs::FileExt::read_exact_at(&*extents[0].file, &mut page, extents[0].offset).unwrap();
        starts.push(page[..6].to_vec());
    }
    starts.sort();
    assert_eq!(starts, [&b"memfd "[..], b"shared", b"sysv\0\0"]);
}
