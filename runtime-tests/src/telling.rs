//! What `lmrun migrate --json` says, for people who watch a demonstration.

use serde_json::Value;

/// Prints what a line says (docs/migrate-events.md).
///
/// # Errors
/// A line that is none of an event.
pub fn tell(line: &str) -> serde_json::Result<()> {
    let event: Value = serde_json::from_str(line)?;
    let number = |name: &str| event[name].as_u64().unwrap_or(0);
    let ms = |name: &str| event[name].as_f64().unwrap_or(0.0) / 1000.0;
    match event["event"].as_str() {
        Some("round") => println!(
            "round {:<4}{:>10} pages{:>10.1} MiB{:>10.1} ms{:>8.1} ms stopped",
            number("round"),
            number("pages"),
            event["bytes"].as_f64().unwrap_or(0.0) / f64::from(1 << 20),
            ms("duration_us"),
            ms("frozen_us")
        ),
        Some("moved") => {
            println!("moved in {:.0} ms, of which it stood still for {:.1} ms:", ms("total_us"), ms("downtime_us"));
            for part in event["downtime"].as_array().into_iter().flatten() {
                println!(
                    "  {:<20}{:>8.1} ms",
                    part["name"].as_str().unwrap_or(""),
                    part["us"].as_f64().unwrap_or(0.0) / 1000.0
                );
            }
        }
        Some("warning") => println!("warning: {}", event["text"]),
        _ => {}
    }
    Ok(())
}
