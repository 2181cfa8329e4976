//! The long form of `tests/engines.rs`: real workloads, through all that an engine does with a container, as a table.
//!
//! `engines [WORKLOAD...]` takes those alone. Ends with 1 when a cell failed; what failed is printed below the table.

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use runtime_tests::engines::{BUSYBOX, Engine, Engines, HOST, HOST_USR};
use runtime_tests::needs;

/// A workload is at work when this succeeds in it, or when its log grows.
enum Sign {
    Command(&'static str, &'static str),
    Log,
}

struct Workload {
    name: &'static str,
    /// On this machine, or there is no such row.
    needs: &'static str,
    image: &'static str,
    options: &'static [&'static str],
    args: &'static [&'static str],
    /// Done once, in the container.
    load: Option<&'static str>,
    sign: Sign,
}

const HTTP: &str =
    r#"exec 3<>/dev/tcp/127.0.0.1/8000 && printf 'GET / HTTP/1.0\r\n\r\n' >&3 && head -1 <&3 | tr -d '\r'"#;
const COUNT: &[&str] = &["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.2; done"];
/// The shortest way to a PostgreSQL, in a directory that goes with the container.
const POSTGRES: &str = "PATH=$(ls -d /usr/lib/postgresql/*/bin | tail -1):$PATH; \
    [ -d /tmp/pg ] || initdb -D /tmp/pg >/dev/null && exec postgres -D /tmp/pg -k /tmp";

const WORKLOADS: &[Workload] = &[
    Workload {
        name: "counter",
        needs: "busybox",
        image: BUSYBOX,
        options: &[],
        args: COUNT,
        load: None,
        sign: Sign::Log,
    },
    Workload {
        name: "user, init",
        needs: "busybox",
        image: BUSYBOX,
        options: &["--user", "1000", "--init", "--read-only", "--tmpfs", "/scratch"],
        args: COUNT,
        load: None,
        sign: Sign::Log,
    },
    Workload {
        name: "held things",
        needs: "python3",
        image: HOST,
        options: &[],
        args: &["python3", "-u", "/held.py"],
        load: None,
        sign: Sign::Log,
    },
    Workload {
        name: "redis 200 MB",
        needs: "redis-server",
        image: HOST,
        options: &[],
        args: &["redis-server", "--save", "", "--enable-debug-command", "yes"],
        load: Some("redis-cli debug populate 50000 key 4096 && redis-cli set name value"),
        sign: Sign::Command("redis-cli get name; redis-cli dbsize", "value\n50001"),
    },
    Workload {
        name: "nginx",
        needs: "nginx",
        image: HOST,
        options: &[],
        args: &["nginx", "-c", "/nginx.conf"],
        load: None,
        sign: Sign::Command(HTTP, "HTTP/1.1 200 OK"),
    },
    Workload {
        name: "postgres",
        needs: "psql",
        image: HOST,
        options: &["--user", "postgres"],
        args: &["bash", "-c", POSTGRES],
        load: Some("psql -qh /tmp postgres -c 'create table t as select generate_series(1, 1000) i'"),
        sign: Sign::Command("psql -Ath /tmp postgres -c 'select sum(i) from t'", "500500"),
    },
    Workload {
        name: "http.server",
        needs: "python3",
        image: HOST,
        options: &["--workdir", "/srv"],
        args: &["python3", "-m", "http.server", "8000"],
        load: None,
        sign: Sign::Command(HTTP, "HTTP/1.0 200 OK"),
    },
    Workload {
        name: "jvm",
        needs: "java",
        image: HOST,
        options: &[],
        args: &["java", "-Xmx64m", "/Counter.java"],
        load: None,
        sign: Sign::Log,
    },
];

/// Files at the root of [`HOST`].
const FILES: [(&str, &str); 3] = [
    (
        "nginx.conf",
        "daemon off; pid /tmp/nginx.pid; error_log /dev/stderr; worker_processes 2; user www-data;\n\
         events { }\nhttp { access_log off; client_body_temp_path /tmp/b; proxy_temp_path /tmp/p;\n\
         fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;\n\
         server { listen 8000; location / { return 200 \"hello\\n\"; } } }\n",
    ),
    (
        "held.py",
        "import ctypes, fcntl, os, socket, time\n\
         libc = ctypes.CDLL(None); i = libc.inotify_init1(0o4000); os.mkdir('/w'); libc.inotify_add_watch(i, b'/w', 0x100)\n\
         f = open('/locked', 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n\
         d = open('/deleted', 'w+b'); d.write(b'x' * (2 << 20)); d.flush(); os.unlink('/deleted')\n\
         u = socket.socket(type=socket.SOCK_DGRAM); u.bind(('127.0.0.1', 0))\n\
         s = socket.create_server(('127.0.0.1', 0)); a = socket.create_connection(s.getsockname()); b, _ = s.accept()\n\
         n = 0\n\
         while True:\n    \
             n += 1; a.sendall(b'%d' % n); assert b.recv(99) == b'%d' % n\n    \
             d.seek(0); assert len(d.read()) == 2 << 20\n    \
             u.sendto(b'u', u.getsockname()); assert u.recv(9) == b'u'\n    \
             open('/w/%d' % n, 'w').close(); assert len(os.read(i, 4096)) >= 16\n    \
             print(n); time.sleep(0.2)\n",
    ),
    (
        "Counter.java",
        "public class Counter { public static void main(String[] a) throws Exception {\n\
         for (int i = 1;; i++) { System.out.println(i); Thread.sleep(200); } } }\n",
    ),
];

type Outcome = Result<(), String>;

/// One workload in one engine.
struct Subject<'a> {
    engines: &'a Engines,
    engine: Engine,
    workload: &'a Workload,
}

const ID: &str = "subject";

impl Subject<'_> {
    fn tell(&self, words: &[&str]) -> Result<String, String> {
        let done = self.engines.perform(self.engine.name(), words);
        if done.succeeded() { Ok(done.out.trim().to_owned()) } else { Err(done.to_string()) }
    }

    fn run(&self) -> Outcome {
        let mut words = vec!["run", "--detach", "--network", "none", "--name", ID];
        words.extend(self.workload.options);
        if self.workload.image == HOST {
            words.extend(HOST_USR);
        }
        words.push(self.workload.image);
        words.extend(self.workload.args);
        self.tell(&words)?;
        if let Some(load) = self.workload.load {
            let begin = Instant::now();
            while let Err(why) = self.tell(&["exec", ID, "bash", "-c", load]) {
                if begin.elapsed() > Duration::from_secs(20) {
                    return Err(why);
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        }
        self.works()
    }

    /// Waits for a sign of life.
    fn works(&self) -> Outcome {
        let lines = || self.tell(&["logs", ID]).map(|text| text.lines().count());
        let before = lines()?;
        let begin = Instant::now();
        loop {
            let said = match &self.workload.sign {
                Sign::Log => match lines()? {
                    now if now > before => return Ok(()),
                    now => format!("the log stays at {now} lines"),
                },
                Sign::Command(command, expected) => match self.tell(&["exec", ID, "bash", "-c", command]) {
                    Ok(said) if said == *expected => return Ok(()),
                    Ok(said) | Err(said) => said,
                },
            };
            if begin.elapsed() > Duration::from_secs(15) {
                return Err(said);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn done(&self, words: &[&str]) -> Outcome {
        self.tell(words).map(drop)
    }

    fn paused(&self) -> Outcome {
        self.done(&["pause", ID])?;
        self.done(&["unpause", ID])?;
        self.works()
    }

    fn left_running(&self) -> Outcome {
        match self.engine {
            Engine::Docker => self.done(&["checkpoint", "create", "--leave-running", ID, "left"])?,
            Engine::Podman => {
                self.done(&["container", "checkpoint", "--leave-running", "--tcp-established", "--file-locks", ID])?;
            }
        }
        self.works()
    }

    fn restored(&self) -> Outcome {
        let archive = self.engines.base.join("subject.tar").display().to_string();
        match self.engine {
            Engine::Docker => {
                self.done(&["checkpoint", "create", ID, "final"])?;
                self.done(&["start", "--checkpoint", "final", ID])?;
            }
            Engine::Podman => {
                let options = ["--tcp-established", "--file-locks"];
                let export = ["container", "checkpoint", "--export", &archive];
                self.done(&export.into_iter().chain(options).chain([ID]).collect::<Vec<_>>())?;
                self.done(&["rm", "--force", ID])?;
                let import = ["container", "restore", "--import", &archive];
                self.done(&import.into_iter().chain(options).collect::<Vec<_>>())?;
            }
        }
        self.works()
    }

    fn again(&self) -> Outcome {
        if self.engine == Engine::Docker {
            self.done(&["checkpoint", "rm", ID, "final"])?;
        }
        self.restored()
    }

    fn ended(&self) -> Outcome {
        self.done(&["stop", "--time", "2", ID])?;
        self.done(&["rm", "--force", ID])
    }
}

type Operation = (&'static str, fn(&Subject<'_>) -> Outcome);

const OPERATIONS: [Operation; 10] = [
    ("run", |s| s.run()),
    ("exec", |s| s.done(&["exec", ID, "true"])),
    ("top", |s| s.done(&["top", ID])),
    ("stats", |s| s.done(&["stats", "--no-stream", ID])),
    ("update", |s| s.done(&["update", "--memory", "1g", "--memory-swap", "2g", ID])),
    ("pause", |s| s.paused()),
    ("checkpoint", |s| s.left_running()),
    ("restore", |s| s.restored()),
    ("twice", |s| s.again()),
    ("stop", |s| s.ended()),
];

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let engines = Engines::start("engines");
    let mut failures = Vec::new();
    print!("{:20} {:8}", "workload", "engine");
    println!("{}", OPERATIONS.iter().map(|(name, _)| format!(" {name:>10}")).collect::<String>());
    for engine in Engine::ALL.into_iter().filter(|engine| engine.is_installed()) {
        engines.import_busybox(engine);
        engines.import_host(engine, &FILES);
        for workload in WORKLOADS.iter().filter(|w| wanted.is_empty() || wanted.iter().any(|name| name == w.name)) {
            print!("{:20} {:8}", workload.name, engine.name());
            if needs::on_path(workload.needs).is_none() {
                println!(" SKIP: no {}", workload.needs);
                continue;
            }
            let subject = Subject { engines: &engines, engine, workload };
            for (name, operation) in OPERATIONS {
                let begin = Instant::now();
                match operation(&subject) {
                    Ok(()) => print!(" {:>7} ms", begin.elapsed().as_millis()),
                    Err(why) => {
                        print!(" {:>10}", "FAILED");
                        failures.push(format!("{} in {}, {name}: {why}", workload.name, engine.name()));
                    }
                }
                let _ = std::io::Write::flush(&mut std::io::stdout());
            }
            println!();
            let _ = subject.tell(&["rm", "--force", ID]);
            let _ = fs::remove_file(engines.base.join("subject.tar"));
        }
    }
    println!();
    failures.iter().for_each(|failure| println!("{failure}\n"));
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
