//! `lmrun migrate` between two engines: one command, and the container is the other host's.

use std::time::{Duration, Instant};

use runtime_tests::engines::{Engine, Engines, Pair};
use runtime_tests::redis::{self, Client, Writer};

const ADDRESS: &str = "10.88.0.7";
const IMAGE: &str = "lmrun-redis";
const DOCKER: Engine = Engine::Docker;

fn lines(host: &Engines, words: &[&str]) -> Vec<String> {
    host.ok(DOCKER, words).lines().map(str::to_owned).collect()
}

/// Nothing of a container is on a host, nor of what was made for it.
#[track_caller]
fn assert_clean(host: &Engines) {
    assert_eq!(lines(host, &["ps", "--all", "--quiet"]), [""; 0]);
    assert_eq!(lines(host, &["volume", "ls", "--quiet"]), [""; 0]);
    let left = host.perform("sh", &["-c", "ls /run/lmrun-standby /run/docker/runtime-*/moby 2>/dev/null; true"]).out;
    assert!(left.lines().all(|line| line.is_empty() || line.ends_with(':')), "{left}");
}

fn connect(pair: &Pair) -> Client {
    pair.client.within(|| redis::wait_until_up(&format!("{ADDRESS}:6379"))).unwrap()
}

/// A pair with a Redis of 64 MiB at `a`, in a network that both hosts are on, with a volume and busybox beside it.
fn with_redis(name: &str, options: &str) -> Pair {
    let pair = Pair::start(name);
    let a = &pair.a;
    let rootfs = a.import_busybox(DOCKER);
    pair.b.import(DOCKER, runtime_tests::engines::BUSYBOX, &rootfs);
    redis::rootfs(&rootfs).unwrap();
    a.import(DOCKER, IMAGE, &rootfs);
    pair.lan(a);
    let run = format!(
        "run --detach --name web --hostname www --network lan --ip {ADDRESS} --label app=web --restart always --memory 512m \
         {options} {IMAGE}"
    );
    a.ok(DOCKER, &run.split_whitespace().chain(redis::ARGS).collect::<Vec<_>>());
    connect(&pair).load(64, |_| ()).unwrap();
    pair
}

/// What a user sees of it.
fn seen(host: &Engines) -> String {
    let format = "{{.Name}} {{.Config.Hostname}} {{.Config.Image}} {{.Config.Cmd}} {{.Config.Labels.app}} \
        {{.HostConfig.RestartPolicy.Name}} {{.HostConfig.Memory}} {{.NetworkSettings.Networks.lan.IPAddress}} \
        {{.State.Status}} {{range .Mounts}}{{.Name}}:{{.Destination}}{{end}}";
    host.ok(DOCKER, &["inspect", "--format", format, "web"])
}

#[track_caller]
fn shell(host: &Engines, script: &str) -> String {
    host.ok(DOCKER, &["exec", "web", "/bin/sh", "-c", script])
}

#[test]
fn a_redis_in_docker_moves_there_and_back() {
    if !Pair::is_possible(DOCKER) {
        return;
    }
    let pair = with_redis("moves", "--volume data:/data");
    let (a, b) = (&pair.a, &pair.b);
    shell(a, "echo mine >/mine; rm /etc/group; mkdir -p /var/x; echo kept >/data/file; mkfifo /fifo; ln /mine /second");
    let before = seen(a);
    let writer = Writer::start(connect(&pair));
    std::thread::sleep(Duration::from_millis(300));

    // A volume that is not there stands in the way, and all runs on.
    let refused = pair.migrate(a, "docker://web", "ssh://b", &["--json"]).failed();
    assert!(refused.err.contains("volume data, at /data, is missing (--volumes"), "{refused}");
    assert_clean(b);
    pair.migrate(a, "docker://web", "ssh://b", &["--volumes", "--check"]).ok();
    assert_clean(b);
    assert!(writer.goes_on());

    let mut here = a;
    for (from, to, host) in [(a, b, "ssh://b"), (b, a, "ssh://a")] {
        let written = format!("echo {host} >>/mine; rm -rf /var/x; echo more >>/data/file");
        shell(from, &written);
        let moved = Instant::now();
        let said = pair.migrate(from, "docker://web", host, &["--json", "--volumes"]).ok();
        println!("{said}");
        assert_eq!(seen(to), before);
        let files =
            shell(to, "test -p /fifo && test ! -e /etc/group && test ! -e /var/x && tail -n 1 /second /data/file");
        assert!(files.contains(host) && files.ends_with("more"), "{files}");
        to.ok(DOCKER, &["stats", "--no-stream", "web"]);
        to.ok(DOCKER, &["logs", "web"]);
        assert!(to.ok(DOCKER, &["top", "web"]).contains("redis-server"));
        // Volumes are not removed with containers.
        assert_eq!(lines(from, &["ps", "--all", "--quiet"]), [""; 0]);
        from.ok(DOCKER, &["volume", "rm", "data"]);
        assert_clean(from);
        println!("acknowledged so far: {}; the move took {:?}", writer.acknowledged(), moved.elapsed());
        here = to;
    }
    let record = writer.finish();
    assert_eq!(record.failure, None);
    println!("longest gap {:?}", record.gaps.first());
    assert_eq!(record.audit(&mut connect(&pair)).unwrap(), (0, 0, 0));
    here.ok(DOCKER, &["stop", "--time", "5", "web"]);
    assert_eq!(here.ok(DOCKER, &["inspect", "--format", "{{.State.ExitCode}}", "web"]), "0");
    here.ok(DOCKER, &["start", "web"]);
    assert!(shell(here, "cat /mine").starts_with("mine"));
}
