//! `lmrun migrate`: one command moves a container that works.

use std::time::{Duration, Instant};

use runtime_tests::hosts::Hosts;
use runtime_tests::migration::Migration;
use runtime_tests::redis::{Record, Writer};
use runtime_tests::runtimes::Runtime;

/// The client kept its connection; nothing was lost, done twice, or is wrong.
fn assert_intact(record: &Record, migration: &Migration<'_>) {
    assert_eq!(record.failure, None);
    assert_eq!(record.audit(&mut migration.connect().unwrap()).unwrap(), (0, 0, 0));
}

#[test]
fn a_redis_moves_and_its_client_keeps_its_connection() {
    let hosts = Hosts::new();
    let migration = Migration::start(&hosts, &Runtime::Lmrun).unwrap();
    migration.connect().unwrap().load(64, |_| ()).unwrap();
    let writer = Writer::start(migration.connect().unwrap());
    std::thread::sleep(Duration::from_millis(300));
    let moved = Instant::now();
    let said = migration.migrate(&[]);
    std::thread::sleep(Duration::from_secs(1));
    let record = writer.finish();
    for line in said.as_ref().unwrap() {
        println!("{line}");
    }
    println!("gap {:?}", record.longest_gap(moved));
    assert_intact(&record, &migration);
}

#[test]
fn a_redis_moves_between_paired_hosts_over_tls() {
    let hosts = Hosts::new();
    let migration = Migration::start(&hosts, &Runtime::Lmrun).unwrap();
    migration.connect().unwrap().load(16, |_| ()).unwrap();
    let writer = Writer::start(migration.connect().unwrap());
    migration.migrate_over_tls(&[]).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let record = writer.finish();
    assert_intact(&record, &migration);
}

#[test]
fn a_look_and_what_is_not_there_yet_change_nothing() {
    let hosts = Hosts::new();
    let migration = Migration::start(&hosts, &Runtime::Lmrun).unwrap();
    let writer = Writer::start(migration.connect().unwrap());
    let said = migration.migrate(&["--check"]).unwrap();
    assert!(said.iter().any(|line| line.contains(r#""event":"verified""#)), "{said:?}");
    assert!(said.iter().all(|line| !line.contains(r#""event":"moved""#)), "{said:?}");
    for flags in [&["--post-copy"][..], &["--offline"], &["--streams", "2"]] {
        let refused = migration.migrate(flags).unwrap_err().to_string();
        assert!(refused.contains("is not supported yet"), "{flags:?}: {refused}");
    }
    // It moves all the same afterwards.
    migration.migrate(&["--compress", "zstd", "--bandwidth", "1Gbit"]).unwrap();
    let record = writer.finish();
    assert_intact(&record, &migration);
}
