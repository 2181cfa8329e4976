//! What runs in the containers.

use runtime_tests::engines::{BUSYBOX, HOST};

/// What shows that a workload is at work, and still the same.
pub enum Sign {
    /// This command in the container prints this.
    Says(&'static str, &'static str),
    /// The number in `/dev/shm/n` grows, and never starts again.
    Counts,
}

/// A question that a client asks over and over on one connection. Escapes are Python's.
pub struct Question {
    pub port: u16,
    /// What is said first, and answered.
    pub greeting: Option<&'static str>,
    pub text: &'static str,
    /// Part of each answer.
    pub answer: &'static str,
}

pub struct Workload {
    pub name: &'static str,
    /// On this machine, or there is no such column.
    pub needs: &'static str,
    pub image: &'static str,
    /// Who it must be.
    pub user: Option<&'static str>,
    pub args: &'static [&'static str],
    /// Done once, in the container.
    pub load: Option<&'static str>,
    pub sign: Sign,
    pub question: Option<Question>,
}

const HTTP: &str =
    r#"exec 3<>/dev/tcp/127.0.0.1/8000 && printf 'GET / HTTP/1.0\r\n\r\n' >&3 && head -1 <&3 | tr -d '\r'"#;
/// The shortest way to a PostgreSQL, in a directory that goes with the container.
const POSTGRES: &str = "PATH=$(ls -d /usr/lib/postgresql/*/bin | tail -1):$PATH; \
    [ -d /tmp/pg ] || { initdb -D /tmp/pg >/dev/null && echo host all all all trust >>/tmp/pg/pg_hba.conf; } && \
    exec postgres -D /tmp/pg -k /tmp -h '*'";

pub const WORKLOADS: &[Workload] = &[
    Workload {
        name: "shell",
        needs: "busybox",
        image: BUSYBOX,
        user: None,
        args: &["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i | tee /dev/shm/n; sleep 0.2; done"],
        load: None,
        sign: Sign::Counts,
        question: None,
    },
    Workload {
        name: "held",
        needs: "python3",
        image: HOST,
        user: None,
        args: &["python3", "-u", "/held.py"],
        load: None,
        sign: Sign::Counts,
        question: None,
    },
    Workload {
        name: "redis",
        needs: "redis-server",
        image: HOST,
        user: None,
        args: &["redis-server", "--save", "", "--enable-debug-command", "yes", "--protected-mode", "no"],
        load: Some("redis-cli debug populate 50000 key 4096 && redis-cli set name value"),
        sign: Sign::Says("redis-cli get name; redis-cli dbsize", "value\n50001"),
        question: Some(Question { port: 6379, greeting: None, text: r"GET name\r\n", answer: "value" }),
    },
    Workload {
        name: "nginx",
        needs: "nginx",
        image: HOST,
        user: None,
        args: &["nginx", "-c", "/nginx.conf"],
        load: None,
        sign: Sign::Says(HTTP, "HTTP/1.1 200 OK"),
        question: Some(Question {
            port: 8000,
            greeting: None,
            text: r"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            answer: "200 OK",
        }),
    },
    Workload {
        name: "postgres",
        needs: "psql",
        image: HOST,
        user: Some("postgres"),
        args: &["bash", "-c", POSTGRES],
        load: Some("psql -qh /tmp postgres -c 'create table if not exists t as select generate_series(1, 1000) i'"),
        sign: Sign::Says("psql -Ath /tmp postgres -c 'select sum(i) from t'", "500500"),
        // Its protocol, version 3: lengths, and words that end with a zero.
        question: Some(Question {
            port: 5432,
            greeting: Some(r"\0\0\0\x17\0\x03\0\0user\0postgres\0\0"),
            text: r"Q\0\0\0\x19select sum(i) from t\0",
            answer: "500500",
        }),
    },
    Workload {
        name: "http",
        needs: "python3",
        image: HOST,
        user: None,
        args: &["python3", "-m", "http.server", "--directory", "/srv", "8000"],
        load: None,
        sign: Sign::Says(HTTP, "HTTP/1.0 200 OK"),
        question: None,
    },
    Workload {
        name: "jvm",
        needs: "java",
        image: HOST,
        user: None,
        args: &["java", "-Xmx64m", "/Counter.java"],
        load: None,
        sign: Sign::Counts,
        question: None,
    },
];

/// Files at the root of [`HOST`].
pub const FILES: [(&str, &str); 3] = [
    (
        "nginx.conf",
        "daemon off; pid /tmp/nginx.pid; error_log /dev/stderr; worker_processes 2; user www-data;\n\
         events { }\nhttp { access_log off; keepalive_requests 1000000; client_body_temp_path /tmp/b;\n\
         proxy_temp_path /tmp/p; fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;\n\
         server { listen 8000; location / { return 200 \"hello\\n\"; } } }\n",
    ),
    (
        "held.py",
        "import ctypes, fcntl, os, socket, time\n\
         os.chdir('/var/tmp' if os.access('/var/tmp', os.W_OK) else '/tmp')\n\
         libc = ctypes.CDLL(None); i = libc.inotify_init1(0o4000); os.makedirs('w', exist_ok=True); libc.inotify_add_watch(i, b'w', 0x100)\n\
         f = open('locked', 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n\
         d = open('deleted', 'w+b'); d.write(b'x' * (2 << 20)); d.flush(); os.unlink('deleted')\n\
         u = socket.socket(type=socket.SOCK_DGRAM); u.bind(('127.0.0.1', 0))\n\
         s = socket.create_server(('127.0.0.1', 0)); a = socket.create_connection(s.getsockname()); b, _ = s.accept()\n\
         n = 0\n\
         while True:\n    \
             n += 1; a.sendall(b'%d' % n); assert b.recv(99) == b'%d' % n\n    \
             d.seek(0); assert len(d.read()) == 2 << 20\n    \
             u.sendto(b'u', u.getsockname()); assert u.recv(9) == b'u'\n    \
             open('w/%d' % time.time_ns(), 'w').close(); assert len(os.read(i, 4096)) >= 16\n    \
             g = open('locked')\n    \
             try: fcntl.flock(g, fcntl.LOCK_EX | fcntl.LOCK_NB); raise SystemExit('the lock is gone')\n    \
             except BlockingIOError: g.close()\n    \
             print(n); print(n, file=open('/dev/shm/n', 'w')); time.sleep(0.2)\n",
    ),
    (
        "Counter.java",
        "import java.nio.file.*;\n\
         public class Counter { public static void main(String[] a) throws Exception {\n\
         for (int i = 1;; i++) { System.out.println(i); Files.writeString(Path.of(\"/dev/shm/n\"), i + \"\\n\");\n\
         Thread.sleep(200); } } }\n",
    ),
];
