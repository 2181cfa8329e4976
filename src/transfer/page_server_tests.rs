use std::io;
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::os::unix::fs::FileExt;
use std::thread;

use super::super::page_client::PageClient;
use super::*;
use crate::image::dir::{ImageDir, ImageWriter};
use crate::image::page_source::page_extents;
use crate::image::page_store::LocalPages;
use crate::image::pages::{PageReader, PageRun, PageSink, PagesOf, Written};
use crate::image::scratch::Scratch;

const TASK: PagesOf = PagesOf::Task(1);
const SHMEM: PagesOf = PagesOf::Shmem(0xfeed_beef_0042);
const PEER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1);

/// Memory in which every page is filled with its address.
struct Pattern;

impl PageReader for Pattern {
    fn read(&self, vaddr: u64, buf: &mut [u8]) -> io::Result<()> {
        for (page, n) in buf.chunks_mut(PAGE_SIZE as usize).zip(0..) {
            page.copy_from_slice(&(vaddr + n * PAGE_SIZE).to_le_bytes().repeat(PAGE_SIZE as usize / 8));
        }
        Ok(())
    }
}

fn run(first: u64, pages: u64, in_parent: bool) -> PageRun {
    PageRun { vaddr: first * PAGE_SIZE, pages, in_parent }
}

/// Page number and number of pages of every extent, all bytes checked.
fn extents(path: &Path, of: PagesOf) -> Vec<(u64, u64)> {
    let dir = ImageDir::open(path).unwrap();
    let check = |extent: crate::image::page_source::Extent| {
        let mut bytes = vec![0; (extent.pages * PAGE_SIZE) as usize];
        extent.file.read_exact_at(&mut bytes, extent.offset).unwrap();
        let mut expected = vec![0; bytes.len()];
        Pattern.read(extent.vaddr, &mut expected).unwrap();
        assert!(bytes == expected, "{extent:?}");
        (extent.vaddr / PAGE_SIZE, extent.pages)
    };
    page_extents(&dir, of).unwrap().into_iter().map(check).collect()
}

/// A server for `images` and what `client` makes of it.
fn session<T>(images: &Path, parent: Option<&Path>, client: impl FnOnce(SocketAddr) -> T) -> (Result<Received>, T) {
    let listener = listen(SocketAddr::new(PEER.ip(), 0), false).unwrap();
    let address = listener.local_addr().unwrap();
    thread::scope(|scope| {
        let server = scope.spawn(|| serve(&listener, images, parent));
        let result = client(address);
        (server.join().unwrap(), result)
    })
}

fn names(path: &Path) -> Vec<String> {
    let mut all: Vec<_> =
        std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

#[test]
fn pages_arrive_and_the_parent_is_known() {
    let tmp = Scratch::new();
    let first = tmp.path().join("first");
    let writer = ImageWriter::create(&first, None).unwrap();
    LocalPages::new(&writer).write(TASK, &[run(0, 100, false)], &Pattern).unwrap();
    writer.commit().unwrap();

    // Single pages, a long run and one that is in the parent.
    let mut runs = vec![run(5, 90, true)];
    runs.extend((50..1050).map(|i| run(i * 2, 1, false)));
    runs.push(run(4000, 3001, false));
    let second = tmp.path().join("second");
    let (received, ()) = session(&second, Some(Path::new("../first")), |address| {
        let mut client = PageClient::connect(address).unwrap();
        assert!(client.has_parent(TASK).unwrap());
        let written = client.write(TASK, &runs, &Pattern).unwrap();
        assert_eq!(written, Written { pages: 4001, in_parent: 90 });
        assert!(!client.has_parent(SHMEM).unwrap());
        client.write(SHMEM, &[run(3, 2, false)], &Pattern).unwrap();
        client.finish().unwrap();
    });
    let written = Written { pages: 4003, in_parent: 90 };
    assert_eq!(received.unwrap(), Received { targets: 2, written });
    assert_eq!(
        names(&second),
        ["pagemap-1.img", "pagemap-shmem-280297064038466.img", "pages-1.img", "pages-2.img", "parent"]
    );
    let all = extents(&second, TASK);
    assert_eq!((all.len(), all[0], all[1001]), (1002, (5, 90), (4000, 3001)));
    assert_eq!(extents(&second, SHMEM), [(3, 2)]);
}

#[test]
fn a_broken_connection_leaves_nothing() {
    let tmp = Scratch::new();
    let images = tmp.path().join("images");
    let (received, ()) = session(&images, None, |address| {
        let mut client = PageClient::connect(address).unwrap();
        client.write(TASK, &[run(0, 1000, false)], &Pattern).unwrap();
    });
    assert!(matches!(received, Err(Error::Connection { .. })));
    assert!(names(&images).is_empty());
}

#[test]
fn memory_that_vanishes_ends_the_transfer() {
    struct Gone;
    impl PageReader for Gone {
        fn read(&self, vaddr: u64, _: &mut [u8]) -> io::Result<()> {
            if vaddr >= 1 << 24 { Err(io::Error::from_raw_os_error(libc::ESRCH)) } else { Ok(()) }
        }
    }
    let tmp = Scratch::new();
    let (received, error) = session(&tmp.path().join("images"), None, |address| {
        PageClient::connect(address).unwrap().write(TASK, &[run(0, 10_000, false)], &Gone).unwrap_err()
    });
    assert!(matches!(error, crate::image::Error::Memory { of: TASK, vaddr: 0x100_0000.., .. }), "{error}");
    assert!(received.is_err());
}

#[test]
fn directories_that_are_taken_are_refused() {
    let tmp = Scratch::new();
    let images = tmp.path().join("images");
    let writer = ImageWriter::create(&images, None).unwrap();
    LocalPages::new(&writer).write(TASK, &[], &Pattern).unwrap();
    writer.commit().unwrap();
    assert!(matches!(Inbox::open(&images, None), Err(Error::Occupied { .. })));

    let other = tmp.path().join("other");
    let _inbox = Inbox::open(&other, None).unwrap();
    assert!(matches!(Inbox::open(&other, None), Err(Error::Busy { .. })));
}

#[test]
fn what_a_killed_server_left_is_removed() {
    let tmp = Scratch::new();
    for name in ["pagemap-1.img.tmp", "pages-1.img.tmp", "core-1.img"] {
        std::fs::write(tmp.path().join(name), "x").unwrap();
    }
    drop(Inbox::open(tmp.path(), None).unwrap());
    assert_eq!(names(tmp.path()), ["core-1.img"]);
}

#[test]
fn only_loopback_is_safe() {
    let open = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
    assert!(matches!(listen(open, false), Err(Error::Exposed { .. })));
    listen(open, true).unwrap();
    assert!(matches!(PageClient::connect("127.0.0.1:1"), Err(Error::Connect { .. })));
}

/// A stream of given bytes; answers are swallowed. Short reads of varying length.
struct Tape<'a>(&'a [u8], usize);

impl Read for Tape<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.1 = self.1 * 7 % 61 + 1;
        let len = self.1.min(self.0.len()).min(buf.len());
        buf[..len].copy_from_slice(&self.0[..len]);
        self.0 = &self.0[len..];
        Ok(len)
    }
}

impl Write for Tape<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn play(images: &Path, bytes: &[u8]) -> Result<Received> {
    let mut inbox = Inbox::open(images, None)?;
    receive(&mut Tape(bytes, 1), PEER, &mut inbox)?;
    inbox.commit()
}

fn add(of: PagesOf, first: u64, pages: u64) -> Vec<u8> {
    let mut bytes = vec![0; (pages * PAGE_SIZE) as usize];
    Pattern.read(first * PAGE_SIZE, &mut bytes).unwrap();
    let message = Message::Add { of, vaddr: first * PAGE_SIZE, pages, flags: pe::PRESENT };
    [&message.encode()[..], &bytes].concat()
}

#[test]
fn messages_are_found_wherever_reads_end() {
    let tmp = Scratch::new();
    let open = Message::Open { of: TASK, answer: false }.encode().to_vec();
    let old = Message::Open { of: PagesOf::Task(2), answer: true }.encode().to_vec();
    let tape = [open, add(TASK, 7, 2), old, add(PagesOf::Task(2), 1, 1), Message::Close.encode().to_vec()].concat();
    play(tmp.path(), &tape).unwrap();
    assert_eq!(extents(tmp.path(), TASK), [(7, 2)]);
    assert_eq!(extents(tmp.path(), PagesOf::Task(2)), [(1, 1)]);
}

#[test]
fn what_is_out_of_order_is_refused() {
    let tmp = Scratch::new();
    let refused = |tape: &[Vec<u8>]| match play(&tmp.path().join("i"), &tape.concat()) {
        Err(Error::Protocol { source, .. }) => source,
        other => panic!("{other:?}"),
    };
    let open = |of| Message::Open { of, answer: false }.encode().to_vec();
    let hole = Message::Add { of: TASK, vaddr: 0, pages: 1, flags: pe::PARENT }.encode().to_vec();
    assert_eq!(refused(&[add(TASK, 1, 1)]), ProtocolError::NotOpen(TASK));
    assert_eq!(refused(&[open(SHMEM), add(TASK, 1, 1)]), ProtocolError::NotOpen(TASK));
    assert_eq!(refused(&[open(TASK), open(SHMEM), open(TASK)]), ProtocolError::Reopened(TASK));
    assert_eq!(refused(&[open(TASK), hole]), ProtocolError::NoParent(TASK));
}

#[test]
fn no_input_makes_the_server_panic() {
    let tmp = Scratch::new();
    let mut state = 88172645463325252u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..2000 {
        let mut tape = Message::Open { of: TASK, answer: true }.encode().to_vec();
        for _ in 0..next() % 4 {
            let mut message = add(TASK, next() % 8, 1);
            for _ in 0..next() % 3 {
                let at = next() as usize % MESSAGE_SIZE;
                message[at] = next() as u8;
            }
            tape.extend(message);
        }
        tape.extend((0..next() % 100).map(|_| next() as u8));
        let images = tmp.path().join(round.to_string());
        let _ = play(&images, &tape);
        std::fs::remove_dir_all(images).unwrap();
    }
}

#[test]
fn a_client_does_not_wait_for_a_server_that_hangs_up() {
    let tmp = Scratch::new();
    let (received, error) = session(&tmp.path().join("i"), None, |address| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&[0xff; MESSAGE_SIZE]).unwrap();
        stream.read(&mut [0]).map_or_else(|e| e.kind(), |_| io::ErrorKind::UnexpectedEof)
    });
    assert!(matches!(received, Err(Error::Protocol { .. })));
    assert!(matches!(error, io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset));
}
