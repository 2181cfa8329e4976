//! `lmrun migrate` between two engines: one command, and the container is the other host's.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use runtime_tests::command;
use runtime_tests::engines::{BUSYBOX, Engine, Engines, Pair};
use runtime_tests::redis::Writer;

/// Slow enough to be killed in the middle.
const MIGRATE: &str = "lmrun migrate --json --bandwidth 5M docker://web ssh://b";
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

/// As [`assert_clean`], once whoever cleans up is done.
#[track_caller]
fn await_clean(host: &Engines) {
    let begin = Instant::now();
    while lines(host, &["ps", "--all", "--quiet"]) != [""; 0] && begin.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_clean(host);
}

/// Begins to move it from `a` to `b`, and kills the first process at `host` whose command line is `line` when `moment` is told of.
#[track_caller]
fn killed_at(pair: &Pair, moment: &str, host: &Engines, line: &str) {
    let words: Vec<&str> = MIGRATE.split(' ').collect();
    let mut migrate = pair.a.command(words[0], &words[1..]);
    let mut migrate = migrate.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut told = BufReader::new(migrate.stdout.take().unwrap()).lines();
    assert!(told.any(|event| event.unwrap().contains(moment)), "{moment}");
    host.perform("sh", &["-c", &format!("kill -9 $(pgrep -o -f -x '{line}')")]).ok();
    let rest: Vec<String> = told.map_while(Result::ok).collect();
    assert!(!migrate.wait().unwrap().success(), "{moment}, {line}: {rest:?}");
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
    let pair = Pair::start("moves");
    pair.run_redis(64, &["--label", "app=web", "--restart", "always", "--memory", "512m", "--volume", "data:/data"]);
    let (a, b) = (&pair.a, &pair.b);
    shell(a, "echo mine >/mine; rm /etc/group; mkdir -p /var/x; echo kept >/data/file; mkfifo /fifo; ln /mine /second");
    let before = seen(a);
    let writer = Writer::start(pair.connect());
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
    assert_eq!(record.audit(&mut pair.connect()).unwrap(), (0, 0, 0));
    here.ok(DOCKER, &["stop", "--time", "5", "web"]);
    assert_eq!(here.ok(DOCKER, &["inspect", "--format", "{{.State.ExitCode}}", "web"]), "0");
    here.ok(DOCKER, &["start", "web"]);
    assert!(shell(here, "cat /mine").starts_with("mine"));
}

/// The connections of a container that stays are as they were.
#[test]
fn what_does_not_come_to_its_end_leaves_nothing() {
    if !Pair::is_possible(DOCKER) {
        return;
    }
    let pair = Pair::start("fails");
    pair.run_redis(16, &["--restart", "always"]);
    let (a, b) = (&pair.a, &pair.b);
    let before = seen(a);
    let writer = Writer::start(pair.connect());

    // Whoever dies, and when: while the engine works, while memory goes over.
    for moment in ["\"prepare\"", "\"pre-copy\""] {
        for (host, line) in [(a, MIGRATE), (b, "lmrun receive --stdio")] {
            killed_at(&pair, moment, host, line);
            assert!(writer.goes_on(), "{moment}, {line}");
            assert_eq!(seen(a), before, "{moment}, {line}");
            await_clean(b);
        }
    }

    // A name that is in use there.
    b.ok(DOCKER, &["create", "--name", "web", BUSYBOX, "true"]);
    let refused = pair.migrate(a, "docker://web", "ssh://b", &[]).failed();
    assert!(refused.err.contains("a container web is there already (rename or remove it)"), "{refused}");
    b.ok(DOCKER, &["rm", "web"]);

    // It is kept where it was, if one says so, and does not come back by itself.
    pair.migrate(a, "docker://web", "ssh://b", &["--keep-source"]).ok();
    let state = a.ok(DOCKER, &["inspect", "--format", "{{.State.Status}} {{.HostConfig.RestartPolicy.Name}}", "web"]);
    assert_eq!(state, "exited no");
    assert!(seen(b).contains("always"));
    a.ok(DOCKER, &["rm", "web"]);

    // The link goes down at the moment of the commit: nobody at b knows how it ended until somebody asks, unless the answer was
    // quicker. One of them runs, and the client never notices.
    let ended = pair.migrate(b, "docker://web", "ssh://a", &["--on-commit", "ip link set eth1 down"]);
    b.perform("ip", &["link", "set", "eth1", "up"]).ok();
    if !ended.succeeded() {
        assert_eq!(ended.status.and_then(|status| status.code()), Some(75), "{ended}");
        assert!(ended.err.contains("to find out: lmrun migrate --settle docker://web"), "{ended}");
        println!("{}", b.perform("lmrun", &["migrate", "--settle", "docker://web"]).ok());
    }
    let running = |host: &Engines| lines(host, &["ps", "--quiet"]).len();
    assert_eq!(running(a) + running(b), 1, "{ended}");
    let record = writer.finish();
    assert_eq!(record.failure, None);
    assert_eq!(record.audit(&mut pair.connect()).unwrap(), (0, 0, 0));

    // What is published is published there.
    let serve = "run --detach --name pages --publish 8080:80 lmrun-busybox httpd -f";
    a.ok(DOCKER, &serve.split(' ').collect::<Vec<_>>());
    pair.migrate(a, "docker://pages", "ssh://b", &[]).ok();
    let page = pair.client.within(|| command::tool("busybox wget -q -O - http://10.88.0.202:8080/etc/passwd"));
    assert!(page.out.contains("root:x:0:0"), "{page}");
}

/// Writes below `/`, all the time: a line for each step, and files and directories that come and go.
const SCRIBE: &str = "i=0; while :; do i=$((i+1)); echo $i >>/log; echo $i >/tmp/f$((i%50)); rm -f /tmp/f$(((i+25)%50)); \
    mkdir -p /d$((i%7))/sub; rm -rf /d$(((i+3)%7)); rm -f /bin/ar; echo $i >/etc/group; mv /etc/group /etc/passwd; done";

#[test]
fn files_that_are_written_meanwhile_arrive() {
    if !Pair::is_possible(DOCKER) {
        return;
    }
    let pair = Pair::start("writes");
    let (a, b) = (&pair.a, &pair.b);
    a.import_busybox(DOCKER);
    a.ok(DOCKER, &["run", "--detach", "--name", "scribe", "--network", "none", BUSYBOX, "sh", "-c", SCRIBE]);
    let lines_of = |host: &Engines| host.ok(DOCKER, &["exec", "scribe", "cat", "/log"]).lines().count();
    let mut before = 0;
    for (from, to, host) in [(a, b, "ssh://b"), (b, a, "ssh://a")] {
        before = before.max(lines_of(from));
        pair.migrate(from, "docker://scribe", host, &[]).ok();
        let log = to.ok(DOCKER, &["exec", "scribe", "cat", "/log"]);
        assert!(log.lines().count() > before && log.lines().zip(1..).all(|(line, n)| line == n.to_string()), "{log}");
        before = log.lines().count();
        to.ok(DOCKER, &["pause", "scribe"]);
        let merged = to.ok(DOCKER, &["inspect", "--format", "{{.GraphDriver.Data.MergedDir}}", "scribe"]);
        let look = format!(
            "cd {merged} && test ! -e bin/ar && ls -d d? | wc -l && ls tmp | wc -l && cat etc/passwd && ls -A | grep -c lmrun; true"
        );
        let seen = to.perform("sh", &["-c", &look]).ok().out;
        let seen: Vec<usize> = seen.lines().map(|line| line.parse().unwrap()).collect();
        let [dirs, files, written, ours] = seen[..] else { panic!("{seen:?}") };
        assert!((3..=5).contains(&dirs) && (23..=27).contains(&files) && written >= before && ours == 0, "{seen:?}");
        to.ok(DOCKER, &["unpause", "scribe"]);
    }
}
