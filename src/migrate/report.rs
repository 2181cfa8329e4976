//! `--report`: a migration on one page, which needs nothing from elsewhere. What comes from the container is text there and
//! nothing else.

use std::fmt::Write;

use super::events::{Entry, Event, Part, Phase, Round, Summary};

/// Width of all charts.
const WIDTH: f64 = 920.0;
/// Room for labels on the left.
const LEFT: f64 = 96.0;
const STYLE: &str = include_str!("report.css");

/// The page.
pub fn html(entries: &[Entry]) -> String {
    let story = Story::of(entries);
    let mut page = String::new();
    let (container, destination) = (text(story.container), text(story.destination));
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>{container} to {destination}</title>\n<style>\n{STYLE}</style>\n\
         <h1>{container} <span class=\"to\">→</span> {destination}</h1>\n{}{}",
        story.outcome(),
        story.tiles(),
    );
    for (title, note, body) in [
        ("Time line", "Phases, and the rounds of pre-copy below them.", story.time_line()),
        (
            "Downtime",
            "What the time between the last instruction here and the first there went into.",
            story.downtime(),
        ),
        (
            "Pages per round",
            "What each round sent, and what it left out (zeros, or like the page before).",
            story.pages(),
        ),
        ("Bandwidth", "On the wire.", story.bandwidth()),
        ("Rounds", "", story.table()),
        ("Events", "", story.notes()),
    ] {
        if !body.is_empty() {
            let _ = write!(page, "<section>\n<h2>{title}</h2>\n<p class=\"note\">{note}</p>\n{body}</section>\n");
        }
    }
    let _ = writeln!(page, "<footer>lmrun {}, migration {}</footer>\n</html>", text(story.lmrun), text(story.token));
    page
}

/// Text for HTML, in an element or in an attribute in double quotes.
fn text(raw: &str) -> String {
    let mut safe = String::with_capacity(raw.len());
    for c in raw.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            // Would turn the direction of what follows, or mean nothing.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => safe.push('\u{fffd}'),
            c if c.is_control() && c != '\n' => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}

/// What the events tell.
#[derive(Default)]
struct Story<'a> {
    container: &'a str,
    destination: &'a str,
    token: &'a str,
    lmrun: &'a str,
    /// With begin and end.
    phases: Vec<(Phase, u64, u64)>,
    /// With the time of their ends.
    rounds: Vec<(u64, &'a Round)>,
    /// Time and bytes per second.
    rates: Vec<(u64, u64)>,
    moved: Option<&'a Summary>,
    failed: Option<(&'a str, &'a str)>,
    checked: Option<(u32, u32)>,
    /// Time, kind and text.
    notes: Vec<(u64, &'static str, String)>,
    end: u64,
}

impl<'a> Story<'a> {
    fn of(entries: &'a [Entry]) -> Self {
        let mut story = Story { end: entries.last().map_or(0, |entry| entry.at_us), ..Story::default() };
        for Entry { at_us, event } in entries {
            let at = *at_us;
            match event {
                Event::Start { container, destination, token, lmrun } => {
                    (story.container, story.destination, story.token, story.lmrun) =
                        (container, destination, token, lmrun);
                }
                Event::Connected { lmrun, streams } => {
                    story.notes.push((at, "", format!("connected with lmrun {lmrun}, {streams} stream(s)")));
                }
                Event::Finding { what, place, remedy, blocks } => {
                    let kind = if *blocks { "blocks" } else { "warns" };
                    story.notes.push((at, kind, format!("{place}: {what}; {remedy}")));
                }
                Event::Verified { blocks, warns } => story.checked = Some((*blocks, *warns)),
                Event::Phase { phase } => {
                    if let Some(last) = story.phases.last_mut() {
                        last.2 = at;
                    }
                    story.phases.push((*phase, at, story.end));
                }
                Event::Progress(progress) => story.rates.push((at, progress.bytes_per_second)),
                Event::Round(round) => story.rounds.push((at, round)),
                Event::Throttle { percent } => {
                    story.notes.push((at, "warns", format!("the container gets {percent} % of its processor time")));
                }
                Event::Warning { text } => story.notes.push((at, "warns", text.clone())),
                Event::Moved(summary) => story.moved = Some(summary),
                Event::Failed { error, container } => story.failed = Some((error, container)),
                Event::Unknown { error, settle } => story.failed = Some((error, settle)),
            }
        }
        story
    }

    fn outcome(&self) -> String {
        match (self.moved, self.failed, self.checked) {
            (Some(moved), ..) => {
                format!("<p class=\"outcome good\">Moved. It stood still for <b>{}</b>.</p>\n", time(moved.downtime_us))
            }
            (_, Some((error, now)), _) => {
                format!("<p class=\"outcome bad\">Not moved: {}<br>The container: {}</p>\n", text(error), text(now))
            }
            (.., Some((blocks, warns))) => {
                let class = if blocks == 0 { "good" } else { "bad" };
                format!("<p class=\"outcome {class}\">Checked: {blocks} in the way, {warns} to know.</p>\n")
            }
            _ => "<p class=\"outcome bad\">It has not come to an end.</p>\n".to_owned(),
        }
    }

    fn tiles(&self) -> String {
        let Some(moved) = self.moved else { return String::new() };
        let memory = moved.pages * 4096;
        let sent = match moved.bytes {
            0 => String::new(),
            bytes => format!("{:.1} : 1", memory as f64 / bytes as f64),
        };
        let tiles = [
            ("downtime", time(moved.downtime_us)),
            ("total", time(moved.total_us)),
            ("rounds", moved.rounds.to_string()),
            ("memory", size(memory)),
            ("on the wire", size(moved.bytes)),
            ("memory to wire", sent),
        ];
        let tile = |(name, value): &(&str, String)| format!("<li><b>{value}</b>{name}</li>");
        format!("<ul class=\"tiles\">{}</ul>\n", tiles.iter().map(tile).collect::<String>())
    }

    /// Where a time is on the charts that go over all of it.
    fn x(&self, at: u64) -> f64 {
        LEFT + (WIDTH - LEFT - 8.0) * at as f64 / self.end.max(1) as f64
    }

    fn time_line(&self) -> String {
        if self.phases.is_empty() {
            return String::new();
        }
        let mut svg = String::new();
        let bar = |svg: &mut String, class: &str, y: f64, from: u64, to: u64, label: &str| {
            let (x, width) = (self.x(from), (self.x(to) - self.x(from)).max(1.5));
            let tip = format!("{label}: {} from {}", time(to.saturating_sub(from)), time(from));
            let _ = writeln!(
                svg,
                "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"20\" rx=\"2\"><title>{tip}</title></rect>"
            );
            // A word that does not fit is in the tip alone.
            if label.len() as f64 * 6.6 + 8.0 < width {
                let _ = writeln!(svg, "<text class=\"in\" x=\"{:.1}\" y=\"{}\">{label}</text>", x + 5.0, y + 14.5);
            }
        };
        let _ = writeln!(svg, "<text x=\"0\" y=\"20.5\">phases</text>\n<text x=\"0\" y=\"48.5\">rounds</text>");
        for (phase, from, to) in &self.phases {
            bar(&mut svg, &format!("phase {}", phase.name()), 6.0, *from, *to, phase.name());
        }
        for (end, round) in &self.rounds {
            let from = end.saturating_sub(round.duration_us);
            let class = if round.last { "round freeze" } else { "round" };
            bar(&mut svg, class, 34.0, from, *end, &format!("{}", round.round));
        }
        self.time_axis(&mut svg, 64.0);
        chart(&svg, 84.0)
    }

    /// Ticks with times at height `y`.
    fn time_axis(&self, svg: &mut String, y: f64) {
        let _ = writeln!(svg, "<line x1=\"{LEFT}\" y1=\"{y}\" x2=\"{:.1}\" y2=\"{y}\"/>", self.x(self.end));
        for tick in ticks(self.end as f64, 8.0) {
            let (x, label) = (self.x(tick as u64), time(tick as u64));
            let _ = writeln!(
                svg,
                "<line x1=\"{x:.1}\" y1=\"{y}\" x2=\"{x:.1}\" y2=\"{}\"/><text class=\"tick mid\" x=\"{x:.1}\" y=\"{}\">{label}</text>",
                y + 4.0,
                y + 16.0
            );
        }
    }

    fn downtime(&self) -> String {
        let Some(moved) = self.moved.filter(|moved| !moved.downtime.is_empty()) else { return String::new() };
        let most = moved.downtime.iter().map(|part| part.us).max().unwrap_or(0).max(1);
        let left = 190.0;
        let mut svg = String::new();
        for (at, Part { name, us }) in moved.downtime.iter().enumerate() {
            let (y, width) = (at as f64 * 26.0 + 4.0, (WIDTH - left - 90.0) * *us as f64 / most as f64);
            let _ = writeln!(
                svg,
                "<text x=\"0\" y=\"{:.1}\">{}</text><rect class=\"phase freeze\" x=\"{left}\" y=\"{y}\" width=\"{:.1}\" height=\"18\" rx=\"2\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                y + 13.5,
                text(&shortened(name)),
                width.max(1.5),
                left + width.max(1.5) + 6.0,
                y + 13.5,
                time(*us)
            );
        }
        chart(&svg, moved.downtime.len() as f64 * 26.0 + 6.0)
    }

    fn pages(&self) -> String {
        // The first round, which sends all, would leave nothing to be seen of the others: a scale of its own logarithm.
        let log = |pages: u64| (pages as f64 + 1.0).log10();
        let most = self.rounds.iter().map(|(_, round)| log(round.pages)).fold(1.0, f64::max).ceil();
        if self.rounds.is_empty() {
            return String::new();
        }
        let (height, step) = (180.0, (WIDTH - LEFT - 8.0) / self.rounds.len() as f64);
        let y = |value: f64| 10.0 + height * (1.0 - value / most);
        let mut svg = String::new();
        for power in 0..=most as u32 {
            let (at, label) = (y(f64::from(power)), count(10u64.pow(power)));
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{}\" y2=\"{at:.1}\"/><text class=\"tick\" x=\"0\" y=\"{:.1}\">{label}</text>",
                WIDTH - 8.0,
                at + 4.0
            );
        }
        for (at, (_, round)) in self.rounds.iter().enumerate() {
            let sent = round.pages.saturating_sub(round.skipped);
            let (x, width) = (LEFT + step * at as f64 + step * 0.15, (step * 0.7).min(80.0));
            let tip = format!("round {}: {} pages, {} not sent", round.round, round.pages, round.skipped);
            let class = if round.last { "round freeze" } else { "round" };
            let (all, part) = (y(log(round.pages)), y(log(sent)));
            let _ = writeln!(
                svg,
                "<rect class=\"skipped\" x=\"{x:.1}\" y=\"{all:.1}\" width=\"{width:.1}\" height=\"{:.1}\"><title>{tip}</title></rect>\
                 <rect class=\"{class}\" x=\"{x:.1}\" y=\"{part:.1}\" width=\"{width:.1}\" height=\"{:.1}\"><title>{tip}</title></rect>\
                 <text class=\"tick mid\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                10.0 + height - all,
                10.0 + height - part,
                x + width / 2.0,
                height + 26.0,
                round.round
            );
        }
        chart(&svg, height + 32.0)
    }

    fn bandwidth(&self) -> String {
        // Rounds that had no time to tell of their progress are steps.
        let told = |from: u64, to: u64| self.rates.iter().any(|(at, _)| (from..to).contains(at));
        let mut points = self.rates.clone();
        for (end, round) in self.rounds.iter().filter(|(_, round)| round.duration_us > 0) {
            let (begin, rate) =
                (end.saturating_sub(round.duration_us), round.bytes as f64 * 1e6 / round.duration_us as f64);
            if !told(begin, *end) {
                points.extend([(begin, 0), (begin, rate as u64), (*end, rate as u64), (*end, 0)]);
            }
        }
        points.sort_by_key(|&(at, _)| at);
        let most = points.iter().map(|&(_, rate)| rate).max().unwrap_or(0) as f64;
        if points.len() < 2 || most == 0.0 {
            return String::new();
        }
        let height = 120.0;
        let y = |rate: f64| 10.0 + height * (1.0 - rate / most);
        let mut svg = String::new();
        const MIB: f64 = 1_048_576.0;
        for tick in ticks(most / MIB, 4.0) {
            let (at, label) = (y(tick * MIB), format!("{tick} MiB/s"));
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{}\" y2=\"{at:.1}\"/><text class=\"tick\" x=\"0\" y=\"{:.1}\">{label}</text>",
                WIDTH - 8.0,
                at + 4.0
            );
        }
        let line: String =
            points.iter().map(|&(at, rate)| format!("{:.1},{:.1} ", self.x(at), y(rate as f64))).collect();
        let (first, last) = (self.x(points[0].0), self.x(points[points.len() - 1].0));
        let floor = y(0.0);
        let _ = write!(
            svg,
            "<polygon class=\"area\" points=\"{first:.1},{floor:.1} {line}{last:.1},{floor:.1}\"/>\n<polyline points=\"{line}\"/>\n"
        );
        self.time_axis(&mut svg, height + 12.0);
        chart(&svg, height + 34.0)
    }

    fn table(&self) -> String {
        if self.rounds.is_empty() {
            return String::new();
        }
        let mut rows = String::new();
        for (_, round) in &self.rounds {
            let cells = [
                round.round.to_string(),
                round.pages.to_string(),
                round.skipped.to_string(),
                size(round.bytes),
                time(round.duration_us),
                time(round.frozen_us),
                size(round.dirty_pages_per_second * 4096) + "/s",
                time(round.expected_downtime_us),
                text(&round.decision),
            ];
            let cells: String = cells.iter().map(|cell| format!("<td>{cell}</td>")).collect();
            let _ = writeln!(rows, "<tr{}>{cells}</tr>", if round.last { " class=\"last\"" } else { "" });
        }
        let heads = ["round", "pages", "not sent", "wire", "took", "frozen", "written", "expected downtime", "then"];
        let heads: String = heads.iter().map(|head| format!("<th>{head}</th>")).collect();
        format!("<table>\n<tr>{heads}</tr>\n{rows}</table>\n")
    }

    fn notes(&self) -> String {
        let note = |(at, kind, said): &(u64, &str, String)| {
            format!("<li class=\"{kind}\"><time>{}</time> {}</li>\n", time(*at), text(said))
        };
        match self.notes.is_empty() {
            true => String::new(),
            false => format!("<ul class=\"notes\">\n{}</ul>\n", self.notes.iter().map(note).collect::<String>()),
        }
    }
}

fn chart(content: &str, height: f64) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\n{content}</svg>\n")
}

/// Round numbers up to `most`, about `count` of them.
fn ticks(most: f64, count: f64) -> impl Iterator<Item = f64> {
    let rough = (most / count).max(1e-9);
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].iter().map(|n| n * power).find(|step| *step >= rough).unwrap_or(rough);
    (0..).map(move |n| f64::from(n) * step).take_while(move |tick| *tick <= most)
}

/// Microseconds for people.
fn time(us: u64) -> String {
    match us {
        0 => "0".into(),
        1..1_000 => format!("{us} µs"),
        1_000..10_000 => format!("{:.1} ms", us as f64 / 1e3),
        10_000..1_000_000 => format!("{} ms", us / 1000),
        1_000_000..60_000_000 => format!("{:.1} s", us as f64 / 1e6),
        _ => format!("{}:{:02} min", us / 60_000_000, us / 1_000_000 % 60),
    }
}

/// A name that has its place.
fn shortened(name: &str) -> String {
    const MOST: usize = 26;
    match name.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", &name[..at]),
        None => name.to_owned(),
    }
}

/// A number for people.
fn count(number: u64) -> String {
    match number {
        0..1_000 => number.to_string(),
        1_000..1_000_000 => format!("{} k", number / 1_000),
        _ => format!("{} M", number / 1_000_000),
    }
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    match bytes {
        0..10_240 => format!("{bytes} B"),
        10_240..10_485_760 => format!("{} KiB", bytes >> 10),
        10_485_760..10_737_418_240 => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> Vec<Entry> {
        let hostile = "</style><script>alert(1)</script>\"'&\u{202e}\u{7}";
        let round = |round, last, pages, duration_us| Round {
            round,
            last,
            pages,
            skipped: pages / 3,
            bytes: pages * 2000,
            duration_us,
            frozen_us: 900,
            dirty_pages_per_second: pages,
            expected_downtime_us: 8000,
            decision: "another".into(),
        };
        let moved = Summary {
            total_us: 2_400_000,
            downtime_us: 9_300,
            downtime: [("freeze and collect", 2100), ("send memory", 900), (hostile, 3300)]
                .map(|(name, us)| Part { name: name.into(), us })
                .to_vec(),
            rounds: 4,
            pages: 300_000,
            bytes: 600_000_000,
        };
        let start = Event::Start {
            container: hostile.into(),
            destination: "ssh://b".into(),
            token: "00".into(),
            lmrun: "0.1.0".into(),
        };
        let finding =
            Event::Finding { what: hostile.into(), place: "container".into(), remedy: "none".into(), blocks: false };
        let all = [
            (0, start),
            (0, Event::Phase { phase: Phase::Connect }),
            (60_000, finding),
            (100_000, Event::Phase { phase: Phase::PreCopy }),
            (1_800_000, Event::Round(round(1, false, 262_144, 1_700_000))),
            (2_100_000, Event::Round(round(2, false, 9_000, 250_000))),
            (2_250_000, Event::Round(round(3, false, 700, 90_000))),
            (2_250_000, Event::Phase { phase: Phase::Freeze }),
            (2_262_000, Event::Round(round(4, true, 120, 9_000))),
            (2_262_000, Event::Phase { phase: Phase::Handover }),
            (2_300_000, Event::Phase { phase: Phase::Cleanup }),
            (2_400_000, Event::Moved(moved)),
        ];
        all.into_iter().map(|(at_us, event)| Entry { at_us, event }).collect()
    }

    #[test]
    fn what_comes_from_the_container_is_text() {
        let page = html(&entries());
        assert!(!page.contains("<script") && !page.contains('\u{202e}') && !page.contains('\u{7}'));
        assert_eq!(page.matches("</style>").count(), 1);
        assert!(page.contains("&lt;script&gt;alert(1)"));
    }

    #[test]
    fn nothing_comes_from_elsewhere() {
        let page = html(&entries());
        for word in ["http", "src=", "href=", "url(", "@import", "<script"] {
            assert!(!page.contains(word), "{word}");
        }
    }

    #[test]
    fn all_elements_are_closed() {
        let page = html(&entries());
        for element in ["section", "svg", "table", "ul", "li", "tr", "td", "text", "title", "h2", "p"] {
            let opened = page.matches(&format!("<{element}>")).count() + page.matches(&format!("<{element} ")).count();
            assert_eq!(opened, page.matches(&format!("</{element}>")).count(), "{element}");
        }
        for number in ["NaN", "inf"] {
            assert!(!page.contains(number));
        }
    }

    #[test]
    fn a_migration_that_came_to_nothing_has_a_page_too() {
        let page = html(&[]);
        assert!(page.contains("has not come to an end"));
        let mut some = entries();
        some.truncate(5);
        let failed = Event::Failed { error: "no room".into(), container: "runs on here".into() };
        some.push(Entry { at_us: 1_900_000, event: failed });
        let page = html(&some);
        assert!(page.contains("Not moved: no room") && page.contains("runs on here") && page.contains("<svg"));
    }

    #[test]
    fn numbers_are_for_people() {
        assert_eq!(
            [0, 999, 1500, 12_345, 2_500_000, 61_000_000].map(time).join(" "),
            "0 999 µs 1.5 ms 12 ms 2.5 s 1:01 min"
        );
        assert_eq!([10, 40_960, 20 << 20, 40 << 30].map(size).join(" "), "10 B 40 KiB 20 MiB 40.0 GiB");
        assert_eq!([1, 2000, 3_000_000].map(count).join(" "), "1 2 k 3 M");
        assert_eq!(shortened(&"ä".repeat(30)), "ä".repeat(26) + "…");
        assert_eq!(ticks(9.0, 4.0).collect::<Vec<_>>(), [0.0, 5.0]);
        assert_eq!(ticks(0.0, 4.0).next(), Some(0.0));
    }
}
