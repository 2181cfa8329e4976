//! The log: lines of text, or runc's JSON lines `{"level", "msg", "time"}`.

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use clap::ValueEnum;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry};

use super::report::Failure;
use crate::runtime::timestamp::rfc3339;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

/// Whether the log goes to a file of its own.
static TO_FILE: AtomicBool = AtomicBool::new(false);

pub fn to_file() -> bool {
    TO_FILE.load(Ordering::Relaxed)
}

/// Starts logging as the global options say.
pub fn start(global: &super::Global) -> Result<(), Failure> {
    let debug = global.debug;
    let wanted = filter_fn(move |event: &Metadata<'_>| {
        // The libraries log what they also return as errors: only for who wants everything.
        let ours = event.target().starts_with("lmrun");
        if debug { *event.level() <= Level::DEBUG } else { ours && *event.level() <= Level::INFO }
    });
    let lines = tracing_subscriber::fmt::layer().event_format(Lines(global.log_format));
    let layer: Box<dyn Layer<Registry> + Send + Sync> = match &global.log {
        None => lines.with_writer(io::stderr).with_filter(wanted).boxed(),
        Some(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path);
            let file = file.map_err(|e| Failure::new(format!("cannot log to {}", path.display()), e))?;
            TO_FILE.store(true, Ordering::Relaxed);
            lines.with_writer(Mutex::new(file)).with_filter(wanted).boxed()
        }
    };
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer))
        .map_err(|e| Failure::new("cannot start the log", e))
}

struct Lines(Format);

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut message = Message::default();
        event.record(&mut message);
        writeln!(writer, "{}", line(self.0, level(*event.metadata().level()), &message.0, SystemTime::now()))
    }
}

fn line(format: Format, level: &str, message: &str, now: SystemTime) -> String {
    let time = rfc3339(now);
    match format {
        Format::Text => format!("time={time} level={level} msg={message:?}"),
        Format::Json => serde_json::json!({ "level": level, "msg": message, "time": time }).to_string(),
    }
}

/// runc's names.
fn level(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        _ => "debug",
    }
}

/// The message, and behind it the other fields as `name=value`.
#[derive(Default)]
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}{}", self.0);
        } else {
            self.0.push_str(&format!(" {}={value:?}", field.name()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_json_line_is_runcs() {
        let json = line(Format::Json, "error", "exec: \"foo\": not found", SystemTime::UNIX_EPOCH);
        assert_eq!(json, r#"{"level":"error","msg":"exec: \"foo\": not found","time":"1970-01-01T00:00:00Z"}"#);
    }
}
