use super::*;
use crate::image::records::core::{CoreEntry, TaskCoreEntry, ThreadCoreEntry, ThreadInfoX86};
use crate::image::records::mm::{PagemapEntry, PagemapHead};
use crate::image::records::task::{FsEntry, ItimerEntry, SaEntry, TaskTimersEntry};

fn write<T: Message>(kind: &ImageFile<T>, records: &[T]) -> Vec<u8> {
    let mut out = RecordWriter::new(kind, Vec::new(), "t".into()).unwrap();
    records.iter().for_each(|r| out.record(r).unwrap());
    out.finish().unwrap()
}

fn read<T: Message + Default>(kind: &ImageFile<T>, bytes: &[u8]) -> Result<Vec<T>> {
    let mut reader = RecordReader::new(kind, bytes, bytes.len() as u64, "t".into())?;
    std::iter::from_fn(|| reader.record().transpose()).collect()
}

fn core() -> CoreEntry {
    CoreEntry {
        mtype: 1,
        thread_info: Some(ThreadInfoX86 { clear_tid_addr: u64::MAX, ..Default::default() }),
        tc: Some(TaskCoreEntry {
            comm: b"\xff not utf-8".to_vec(),
            sigactions: vec![SaEntry { sigaction: 1, ..Default::default() }; 62],
            timers: Some(TaskTimersEntry { prof: ItimerEntry { isec: 3, ..Default::default() }, ..Default::default() }),
            oom_score_adj: Some(-1000),
            ..Default::default()
        }),
        thread_core: Some(ThreadCoreEntry { sched_nice: Some(-20), ..Default::default() }),
        ..Default::default()
    }
}

/// A small pseudorandom sequence, the same in every run.
fn noise(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

#[test]
fn names_follow_the_kind() {
    assert_eq!(PSTREE.name(0), "pstree.img");
    assert_eq!(CORE.name(4026), "core-4026.img");
    assert_eq!(GHOST_FILE.name(0xbeef), "ghost-file-beef.img");
    assert_eq!(STATS_DUMP.name(0), "stats-dump");
    assert_eq!(pages_name(3), "pages-3.img");
}

#[test]
fn the_bytes_are_those_of_the_format() {
    let bytes = write(&FS, &[FsEntry { cwd_id: 1, root_id: 300, umask: Some(0o22) }]);
    let expected = [
        &[0x19, 0x43, 0x56, 0x54][..], // images
        &[0x12, 0x39, 0x40, 0x51],     // fs
        &[7, 0, 0, 0],
        &[0x08, 1, 0x10, 0xac, 0x02, 0x18, 0o22],
    ];
    assert_eq!(bytes, expected.concat());
    // Repeated scalars one by one; the inventory without the family.
    let head = write(&INVENTORY, &[]);
    assert_eq!(head, 0x5831_3116u32.to_le_bytes());
    let pstree = write(&PSTREE, &[inventory::PstreeEntry { threads: vec![1, 2], ..Default::default() }]);
    assert_eq!(pstree[pstree.len() - 4..], [0x28, 1, 0x28, 2]);
}

#[test]
fn records_come_back() {
    let records = [core(), CoreEntry::default()];
    assert_eq!(read(&CORE, &write(&CORE, &records)).unwrap(), records);
}

#[test]
fn another_kind_is_refused() {
    let bytes = write(&FS, &[]);
    assert!(matches!(read(&CORE, &bytes), Err(Error::Magic { found: 0x5140_3912, expected: 0x5505_3847, .. })));
    assert!(matches!(read(&INVENTORY, &bytes), Err(Error::Magic { .. })));
}

#[test]
fn every_truncation_is_noticed_and_says_where() {
    let bytes = write(&FS, &[FsEntry::default(), FsEntry { umask: Some(2), ..Default::default() }]);
    let whole = [8, 8 + 4 + 4, bytes.len()];
    for cut in 0..bytes.len() {
        match read(&FS, &bytes[..cut]) {
            Ok(_) => assert!(whole.contains(&cut), "{cut}"),
            Err(Error::Truncated { offset, wanted, left, .. }) => {
                assert!(offset + left == cut as u64 && wanted > left);
            }
            Err(e) => panic!("{cut}: {e}"),
        }
    }
}

#[test]
fn a_length_is_not_believed() {
    let mut bytes = write(&FS, &[]);
    bytes.extend(u32::MAX.to_le_bytes());
    assert!(matches!(read(&FS, &bytes), Err(Error::TooLong { offset: 8, .. })));
}

#[test]
fn unknown_and_missing_fields_are_refused_by_number() {
    // A pagemap of a later version with a field of its own.
    let mut bytes = PagemapEntry { vaddr: 4096, compat_nr_pages: 1, ..Default::default() }.encode_to_vec();
    assert!(decode::<PagemapEntry>(&bytes).is_ok());
    bytes.extend([0x30, 1]);
    let error = decode::<PagemapEntry>(&bytes).unwrap_err();
    assert_eq!(error.to_string(), "unknown field 6");
    assert_eq!(decode::<PagemapHead>(&[]).unwrap_err().to_string(), "required field 1 is missing");

    // Inside a message: field 30 in field 3 (tc).
    let mut inner = core().tc.unwrap().encode_to_vec();
    inner.extend([0xf0, 0x01, 5]);
    let mut bytes = vec![0x08, 1, 0x1a];
    prost::encoding::encode_varint(inner.len() as u64, &mut bytes);
    bytes.extend(inner);
    assert_eq!(decode::<CoreEntry>(&bytes).unwrap_err().to_string(), "unknown field 3.30");
}

#[test]
fn no_input_makes_a_decoder_panic() {
    let good = core().encode_to_vec();
    let mut next = noise(42);
    for _ in 0..20_000 {
        let mut bytes = good.clone();
        for _ in 0..1 + next() % 8 {
            let at = next() as usize % bytes.len();
            bytes[at] = next() as u8;
        }
        bytes.truncate(next() as usize % (bytes.len() + 1));
        let _ = decode::<CoreEntry>(&bytes);
        let junk: Vec<u8> = (0..next() % 64).map(|_| next() as u8).collect();
        let _ = (decode::<files::FileEntry>(&junk), decode::<mm::MmEntry>(&junk), decode::<cgroup::CgroupEntry>(&junk));
        let _ = read(&CORE, &[CORE.header(), junk].concat());
    }
}
