//! `lmrun migrate` between two engines: one command, and the container is the other host's.

use std::time::{Duration, Instant};

use runtime_tests::engines::{Engine, Engines, Pair};
use runtime_tests::redis::{self, Writer};

const ADDRESS: &str = "10.88.0.7";
const IMAGE: &str = "lmrun-redis";

fn lines(host: &Engines, words: &[&str]) -> Vec<String> {
    host.ok(Engine::Docker, words).lines().map(str::to_owned).collect()
}

#[test]
fn a_redis_in_docker_moves_there_and_back() {
    if !Pair::is_possible(Engine::Docker) {
        return;
    }
    let docker = Engine::Docker;
    let pair = Pair::start("moves");
    let (a, b) = (&pair.a, &pair.b);
    let rootfs = a.base.join("redis");
    redis::rootfs(&rootfs).unwrap();
    a.import(docker, IMAGE, &rootfs);
    pair.lan(a);
    let options = format!(
        "run --detach --name web --hostname www --network lan --ip {ADDRESS} --label app=web --restart always --memory 512m {IMAGE}"
    );
    a.ok(docker, &options.split_whitespace().chain(redis::ARGS).collect::<Vec<_>>());
    let connect = || pair.client.within(|| redis::wait_until_up(&format!("{ADDRESS}:6379"))).unwrap();
    connect().load(64, |_| ()).unwrap();
    let writer = Writer::start(connect());
    std::thread::sleep(Duration::from_millis(300));
    let moved = Instant::now();
    let said = pair.migrate(a, "docker://web", "ssh://b", &["--json"]).ok();
    println!("{said}");
    std::thread::sleep(Duration::from_secs(1));
    let record = writer.finish();
    println!("gap {:?}", record.longest_gap(moved));
    assert_eq!(record.failure, None);
    assert_eq!(record.audit(&mut connect()).unwrap(), (0, 0, 0));
    assert_eq!(lines(a, &["ps", "--all", "--quiet"]), [""; 0]);
    assert_eq!(lines(b, &["ps", "--format", "{{.Names}} {{.Status}}"]).len(), 1);
}
