//! Round trips, broken streams, hostile bytes.

use std::collections::BTreeMap;
use std::io::{Cursor, Read};

use super::message::*;
use super::*;
use crate::image::pages::{PAGE_SIZE, PagesOf};

const OF: PagesOf = PagesOf::Task(7);
const PAGE: usize = PAGE_SIZE as usize;

/// Numbers that look random and are the same each time (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }
}

fn offer() -> Offer {
    Offer {
        id: "web1".into(),
        bundle: Some(b"/b\xff".to_vec()),
        annotations: BTreeMap::from([("a".into(), "1".into()), ("b".into(), String::new())]),
        manner: Manner { tcp_established: true, streams: 3, ..Manner::default() },
        images: vec!["config.json".into()],
        ..Offer::default()
    }
}

/// A stream with messages of all sorts.
fn conversation() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut to = Writer::new(&mut bytes);
    let hello = Hello { protocol: PROTOCOL, token: "00ff".into(), ..Hello::default() };
    to.send(&hello).unwrap();
    to.send(&offer()).unwrap();
    to.send_image("config.json", b"{}").unwrap();
    to.send(&Ping { sent: -3 }).unwrap();
    to.send(&Keepalive {}).unwrap();
    to.send(&Round { number: 1, last: false }).unwrap();
    let extents = vec![Extent { vaddr: 0x7f00_0000_0000, pages: 9 }];
    to.send(&Present { of: OF.into(), start: 0, end: 1 << 47, extents }).unwrap();
    to.send_pages(OF, 0x1000, 1, Encoding::Raw, &[7; PAGE]).unwrap();
    to.send_pages(PagesOf::Shmem(u64::MAX), 0, 1 << 18, Encoding::Zero, &[]).unwrap();
    to.send_disk(b"disk").unwrap();
    to.send_engine(b"engine").unwrap();
    to.send_network(b"").unwrap();
    to.say(&Done {}).unwrap();
    drop(to);
    bytes
}

fn received(bytes: &[u8]) -> (Vec<Message>, Error) {
    let mut from = Reader::new(bytes);
    let mut all = Vec::new();
    loop {
        match from.recv() {
            Ok(message) => all.push(message),
            Err(end) => return (all, end),
        }
    }
}

#[test]
fn what_is_said_is_heard() {
    let (all, end) = received(&conversation());
    assert!(matches!(end, Error::Closed));
    let names: Vec<_> = all.iter().map(Message::name).collect();
    let expected = "Hello Offer Image Ping Round Present Pages Pages Disk Engine Network Done";
    assert_eq!(names.join(" "), expected, "Keepalive is no news");
    assert_eq!(all[1], Message::Offer(offer()));
    assert_eq!(all[3], Message::Ping(Ping { sent: -3 }));
    let Message::Present(present) = &all[5] else { panic!() };
    assert_eq!(PagesOf::try_from(present.of).unwrap(), OF);
    let Message::Pages(pages) = &all[6] else { panic!() };
    assert_eq!((pages.of, pages.vaddr, pages.count), (OF, 0x1000, 1));
    assert_eq!(pages.content(&mut Vec::new()).unwrap(), Content::Bytes(&[7; PAGE]));
    assert_eq!(all[8], Message::Disk(b"disk".to_vec()));
}

#[test]
fn the_bytes_are_those_of_the_documentation() {
    let mut bytes = Vec::new();
    Writer::new(&mut bytes).say(&Round { number: 5, last: true }).unwrap();
    assert_eq!(bytes, [9, 0, 0, 0, 4, 0, 0, 0, 0x08, 5, 0x10, 1]);
    let mut to = Writer::new(&mut bytes);
    to.send_pages(PagesOf::Shmem(0x0102), 0x3000, 2, Encoding::Zero, &[]).unwrap();
    to.flush().unwrap();
    drop(to);
    let words: Vec<_> = bytes[12..].chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect();
    assert_eq!(words, [65 | 32 << 32, 1 | 1 << 32, 0x0102, 0x3000, 2]);
}

#[test]
fn a_stream_that_ends_anywhere_is_an_error_and_nothing_else() {
    let whole = conversation();
    let (all, _) = received(&whole);
    for length in 0..whole.len() {
        let (some, end) = received(&whole[..length]);
        assert!(some.len() <= all.len() && some[..] == all[..some.len()], "{length}");
        assert!(matches!(end, Error::Truncated | Error::Closed), "{length}: {end}");
    }
}

#[test]
fn hostile_bytes_are_errors_and_nothing_else() {
    let mut numbers = Numbers(1);
    let whole = conversation();
    for _ in 0..20_000 {
        // Bytes of a conversation, a few of them changed: deep enough to reach every decoder.
        let mut bytes = whole.clone();
        for _ in 0..1 + numbers.next() % 4 {
            let at = numbers.next() as usize % bytes.len();
            bytes[at] = numbers.next() as u8;
        }
        let mut room = Vec::new();
        for message in received(&bytes).0 {
            if let Message::Pages(pages) = message {
                let _ = pages.content(&mut room);
            }
        }
        let length = numbers.next() as usize % 200;
        received(&numbers.bytes(length));
        // Of every type, with a length that fits.
        let mut frame = numbers.bytes(8 + length);
        frame[..8].copy_from_slice(&[numbers.next() as u8 % 72, 0, 0, 0, length as u8, 0, 0, 0]);
        received(&frame);
    }
}

#[test]
fn what_cannot_be_is_refused_before_it_is_read() {
    /// Ends the test if anybody asks for the payload.
    struct Bomb(Cursor<Vec<u8>>);
    impl Read for Bomb {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            let n = self.0.read(buf)?;
            assert!(n > 0, "the payload was asked for");
            Ok(n)
        }
    }
    let refused = |kind: u16, flags: u16, length: u32, more: &[u8]| {
        let mut bytes = [kind.to_le_bytes(), flags.to_le_bytes()].concat();
        bytes.extend(length.to_le_bytes());
        bytes.extend(more);
        Reader::new(Bomb(Cursor::new(bytes))).recv().unwrap_err().to_string()
    };
    assert_eq!(refused(999, 0, 0, &[]), "received a message of unknown type 999");
    assert_eq!(refused(1, 2, 0, &[]), "received a message of type 1 with unknown flags 0x2");
    assert_eq!(refused(1, 0, 1 << 20 | 1, &[]), "a control message has 1048577 bytes: more than 1048576");
    assert_eq!(refused(66, 0, u32::MAX, &[]), "Disk has 4294967295 bytes: more than 1048576");
    let pages =
        |vaddr, count, encoding, length: u32| refused(65, 0, length + 32, &Pages::head(OF, vaddr, count, encoding));
    assert!(pages(1, 1, Encoding::Zero, 0).contains("no such memory"));
    assert!(pages(0, u64::MAX, Encoding::Zero, 0).contains("no such memory"));
    assert!(pages(0, 0, Encoding::Raw, 0).contains("no such memory"));
    assert!(pages(0, 257, Encoding::Raw, 257 << 12).contains("257 pages (Raw)"));
    assert!(pages(0, 2, Encoding::Raw, 4096).contains("2 pages (Raw) in 4096 bytes"));
    assert!(pages(0, 2, Encoding::Lz4, 8192).contains("2 pages (Lz4) in 8192 bytes"));
    assert!(pages(0, 1 << 19, Encoding::Zero, 0).contains("524288 pages (Zero)"));
    assert!(refused(64, 0, 6, &[0, 4, b'a', b'/', b'.', b'.']).contains("calls itself"));
    assert!(refused(64, 0, 4, &[0, 2, b'.', b'.']).contains("calls itself"));
    assert!(refused(64, 0, 1, &[]).contains("frame of 1 bytes"));
}

#[test]
fn a_field_of_another_version_is_refused() {
    let frame = [4, 0, 0, 0, 2, 0, 0, 0, 0x78, 1];
    assert!(matches!(received(&frame).1, Error::UnknownFields { what: "Accept" }));
}

#[test]
fn what_is_not_due_is_told_by_name() {
    let heard = |bytes: &[u8]| Reader::new(bytes).expect::<Ready>().unwrap_err().to_string();
    let mut bytes = Vec::new();
    Writer::new(&mut bytes).say(&Abort { reason: "no room".into() }).unwrap();
    assert_eq!(heard(&bytes), "the other end gave up: no room");
    bytes.clear();
    Writer::new(&mut bytes).say(&Done {}).unwrap();
    assert_eq!(heard(&bytes), "received a Done where Ready was due");
}

#[test]
fn images_are_put_together_from_parts() {
    let large = Numbers(2).bytes(2 * MAX_PAYLOAD + 5);
    let mut bytes = Vec::new();
    let mut to = Writer::new(&mut bytes);
    for (name, content) in [("a", &large[..]), ("empty", &[]), ("exact", &large[..MAX_PAYLOAD])] {
        to.send_image(name, content).unwrap();
    }
    to.flush().unwrap();
    drop(to);
    let parts = || {
        received(&bytes).0.into_iter().map(|message| match message {
            Message::Image(part) => part,
            other => panic!("{other:?}"),
        })
    };
    assert_eq!(parts().count(), 3 + 1 + 1);
    let mut images = Images::new(4 * MAX_PAYLOAD);
    parts().for_each(|part| images.add(part).unwrap());
    let whole = images.finish().unwrap();
    assert!(whole["a"] == large && whole["empty"].is_empty() && whole["exact"] == large[..MAX_PAYLOAD]);

    let part = |name: &str, more, length| Image { name: name.into(), more, bytes: vec![0; length] };
    let mut small = Images::new(10);
    small.add(part("a", true, 6)).unwrap();
    let error = small.add(part("a", false, 5)).unwrap_err().to_string();
    assert_eq!(error, "the images has 11 bytes: more than 10");
    let mut mixed = Images::new(10);
    mixed.add(part("a", true, 1)).unwrap();
    assert!(mixed.add(part("b", false, 1)).is_err());
    let mut twice = Images::new(10);
    twice.add(part("a", false, 1)).unwrap();
    assert!(twice.add(part("a", false, 1)).is_err());
    let mut open = Images::new(10);
    open.add(part("a", true, 1)).unwrap();
    assert!(open.finish().is_err());
}

/// Sends pages, lands them in a copy, and tells how.
fn landed(memory: &[u8], compression: Compression) -> (Vec<(u64, u64, Encoding)>, PageEncoder) {
    let mut bytes = Vec::new();
    let mut to = Writer::new(&mut bytes);
    let mut encoder = PageEncoder::new(compression);
    encoder.send(&mut to, OF, 0, memory).unwrap();
    to.flush().unwrap();
    drop(to);
    let mut copy = vec![0xee; memory.len()];
    let mut room = Vec::new();
    let mut how = Vec::new();
    for message in received(&bytes).0 {
        let Message::Pages(pages) = message else { panic!() };
        let place = &mut copy[pages.vaddr as usize..][..pages.count as usize * PAGE];
        match pages.content(&mut room).unwrap() {
            Content::Bytes(bytes) => place.copy_from_slice(bytes),
            Content::Zeros => place.fill(0),
            Content::Repeat(page) => place.chunks_mut(PAGE).for_each(|one| one.copy_from_slice(page)),
        }
        how.push((pages.vaddr / PAGE_SIZE, pages.count, pages.encoding));
    }
    assert!(copy == memory);
    (how, encoder)
}

#[test]
fn zeros_and_repetitions_are_not_sent() {
    let mut numbers = Numbers(3);
    let [a, b] = [numbers.bytes(PAGE), numbers.bytes(PAGE)];
    let zero = vec![0; PAGE];
    let memory = [&zero, &zero, &a, &b, &b, &b, &a, &a, &zero, &a, &b].map(|page| &page[..]).concat();
    let (how, encoder) = landed(&memory, Compression::Lz4);
    let expected = [
        (0, 2, Encoding::Zero),
        (2, 1, Encoding::Raw),
        (3, 3, Encoding::Repeat),
        (6, 2, Encoding::Repeat),
        (8, 1, Encoding::Zero),
        (9, 2, Encoding::Raw),
    ];
    assert_eq!(how, expected, "and what is random is sent as it is");
    assert_eq!((encoder.sent.pages, encoder.sent.zero, encoder.sent.repeated), (11, 3, 3));
    assert_eq!(encoder.sent.bytes, 5 * PAGE_SIZE);
}

#[test]
fn what_gets_shorter_is_compressed() {
    let text: Vec<u8> = (0..64 * PAGE).map(|i| if i % 7 == 0 { (i / 100) as u8 } else { b'x' }).collect();
    let (how, encoder) = landed(&text, Compression::Lz4);
    assert_eq!(how, [(0, 64, Encoding::Lz4)]);
    assert!(encoder.sent.bytes < text.len() as u64 / 2);
    assert_eq!(landed(&text, Compression::None).0, [(0, 64, Encoding::Raw)]);
    let (how, shorter) = landed(&text, Compression::Zstd);
    assert_eq!(how, [(0, 64, Encoding::Zstd)]);
    assert!(shorter.sent.bytes < text.len() as u64 / 2);
    let random = Numbers(5).bytes(8 * PAGE);
    assert_eq!(landed(&random, Compression::Zstd).0, [(0, 8, Encoding::Raw)]);
}

#[test]
fn a_packed_page_that_was_tampered_with_is_an_error_or_another_page() {
    let text: Vec<u8> = (0..4 * PAGE).map(|i| if i % 9 == 0 { (i / 50) as u8 } else { b'y' }).collect();
    let mut numbers = Numbers(6);
    for compression in [Compression::Lz4, Compression::Zstd] {
        let mut bytes = Vec::new();
        let mut to = Writer::new(&mut bytes);
        PageEncoder::new(compression).send(&mut to, OF, 0, &text).unwrap();
        to.flush().unwrap();
        drop(to);
        let mut room = Vec::new();
        for _ in 0..2_000 {
            let Message::Pages(mut pages) = received(&bytes).0.remove(0) else { panic!() };
            for _ in 0..1 + numbers.next() % 3 {
                let at = numbers.next() as usize % pages.payload.len();
                pages.payload[at] = numbers.next() as u8;
            }
            if let Ok(Content::Bytes(content)) = pages.content(&mut room) {
                assert_eq!(content.len(), text.len());
            }
        }
    }
}

#[test]
fn all_mixtures_of_pages_land_as_they_were() {
    let mut numbers = Numbers(4);
    let kinds = [vec![0; PAGE], vec![1; PAGE], numbers.bytes(PAGE), numbers.bytes(PAGE)];
    for _ in 0..200 {
        let count = 1 + numbers.next() % 12;
        let memory: Vec<u8> = (0..count).flat_map(|_| kinds[numbers.next() as usize % 4].clone()).collect();
        landed(&memory, Compression::Lz4);
        landed(&memory, Compression::Zstd);
    }
}
