//! When pre-copy has done what it can: a pure function of the rounds so far.
//!
//! A freeze costs something fixed, and the pages that are written until then. What a round finds written shrinks from
//! round to round, as long as it is sent quicker than it is written; then it does so no longer. The rule freezes as soon as the freeze fits the target, and
//! where it will never fit, it says what else can be done. It comes to an end by itself: every round but two in a row is
//! better by a tenth than all before it.

use std::time::Duration;

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// For the freeze.
    pub target: Duration,
    /// What the freeze may take where more rounds do not help; twice the target always is.
    pub limit: Duration,
    /// For all of pre-copy.
    pub max_time: Option<Duration>,
    pub post_copy: bool,
    /// The container's processor time can be cut.
    pub throttle: bool,
}

/// What a round found and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Written since the round before, and sent by this one. In the first round: all there is.
    pub pages: u64,
    /// In which these were written: from the beginning of the round before to that of this one.
    pub interval: Duration,
    /// From the beginning of this round to its end.
    pub took: Duration,
    /// For which pages were on their way.
    pub sending: Duration,
    /// What a freeze would take without any pages.
    pub fixed: Duration,
    /// Percent of its processor time that the container had.
    pub throttle: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Another,
    Freeze,
    /// Another, with so many percent of the processor time that the container takes of its own accord.
    Throttle(u32),
    /// Freeze, and go on at the destination before all memory is there.
    PostCopy,
    GiveUp {
        why: String,
    },
}

/// As events and reports have it.
impl std::fmt::Display for Decision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Decision::Another => f.write_str("another"),
            Decision::Freeze => f.write_str("freeze"),
            Decision::Throttle(percent) => write!(f, "throttle to {percent} %"),
            Decision::PostCopy => f.write_str("post-copy"),
            Decision::GiveUp { why } => write!(f, "give up: {why}"),
        }
    }
}

/// One after the other, in percent.
const THROTTLES: [u32; 4] = [50, 25, 12, 6];
/// What counts as better than before.
const BETTER: f64 = 0.9;
/// Such a multiple of the target is still taken where more rounds do not help.
const GOOD_ENOUGH: u32 = 2;

/// What comes after the last of `rounds`, of which there is at least one.
pub fn decide(rule: &Rule, rounds: &[Round]) -> Decision {
    let Some(last) = rounds.last() else { return Decision::Another };
    let expected = expected(rounds);
    // Where the fixed part alone is more than was asked for, pages are to be a small part of it.
    let goal = rule.target.max(last.fixed * 5 / 4);
    if rounds.len() > 1 && expected <= goal {
        return Decision::Freeze;
    }
    let late = rule.max_time.is_some_and(|most| rounds.iter().map(|round| round.took).sum::<Duration>() >= most);
    if !late && !is_level(rounds) {
        return Decision::Another;
    }
    if rounds.len() > 1 && expected <= rule.limit.max(goal * GOOD_ENOUGH) {
        return Decision::Freeze;
    }
    if rule.post_copy {
        return Decision::PostCopy;
    }
    match THROTTLES.iter().find(|&&percent| percent < last.throttle) {
        Some(&percent) if rule.throttle && !late => Decision::Throttle(percent),
        _ => Decision::GiveUp { why: why(rule, last, expected, late) },
    }
}

fn why(rule: &Rule, last: &Round, expected: Duration, late: bool) -> String {
    let what = if late { "the time is over" } else { "more rounds do not help" };
    let throttled = match last.throttle {
        100 => String::new(),
        percent => format!(" even with {percent} % of its processor time"),
    };
    let ms = |duration: Duration| duration.as_millis();
    format!(
        "{what}: it writes {} MiB/s{throttled}, and would stand still for {} ms where {} ms are wanted; allow that with \
         --downtime-target, or use --post-copy, or --offline",
        (rate(last) * 4096.0) as u64 >> 20,
        ms(expected),
        ms(rule.target)
    )
}

/// Pages per second that were written.
pub fn rate(round: &Round) -> f64 {
    round.pages as f64 / round.interval.as_secs_f64().max(1e-6)
}

/// Pages per second that get across; it is known from all rounds together.
pub fn bandwidth(rounds: &[Round]) -> f64 {
    let pages: u64 = rounds.iter().map(|round| round.pages).sum();
    let sending: Duration = rounds.iter().map(|round| round.sending).sum();
    (pages as f64 / sending.as_secs_f64().max(1e-6)).max(1.0)
}

/// How long the container would stand still if it were frozen after these rounds.
pub fn expected(rounds: &[Round]) -> Duration {
    let Some(last) = rounds.last() else { return Duration::MAX };
    // Of the first round nobody knows what is written meanwhile: as much as it sent, at worst.
    let pages = if rounds.len() == 1 { last.pages as f64 } else { rate(last) * last.took.as_secs_f64() };
    last.fixed + Duration::from_secs_f64((pages / bandwidth(rounds)).min(1e9))
}

/// Whether the last two rounds with the present throttle were no better than all before them.
fn is_level(rounds: &[Round]) -> bool {
    let Some(last) = rounds.last() else { return false };
    let same = rounds.iter().rev().take_while(|round| round.throttle == last.throttle).count();
    // The first of all tells nothing, nor does the first after a change, which was found half in the time before.
    let from = (rounds.len() - same).max(1) + usize::from(same < rounds.len());
    let costs: Vec<f64> = (from..rounds.len()).map(|at| expected(&rounds[..=at]).as_secs_f64()).collect();
    let no_better = |at: usize| {
        let best = costs[..at].iter().copied().fold(f64::INFINITY, f64::min);
        costs[at] > best * BETTER
    };
    costs.len() > 2 && no_better(costs.len() - 1) && no_better(costs.len() - 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A container that writes `rate` pages per second to a working set, and a link of 100,000 pages per second.
    struct Load {
        pages: u64,
        rate: f64,
        working_set: f64,
    }

    const LINK: f64 = 100_000.0;
    const FIXED: Duration = Duration::from_millis(5);

    fn rule(target_ms: u64) -> Rule {
        Rule {
            target: Duration::from_millis(target_ms),
            limit: Duration::ZERO,
            max_time: None,
            post_copy: false,
            throttle: true,
        }
    }

    impl Load {
        /// Lives through rounds until something else is decided. Gives all rounds.
        fn run(&self, rule: &Rule) -> (Vec<Round>, Decision) {
            let mut rounds: Vec<Round> = Vec::new();
            let mut throttle = 100;
            loop {
                let interval = rounds.last().map_or(Duration::ZERO, |last| last.took);
                // Pages that are written twice count once: the set fills up.
                let writes = self.rate * f64::from(throttle) / 100.0 * interval.as_secs_f64();
                let written = self.working_set * (1.0 - (-writes / self.working_set).exp());
                let pages = if rounds.is_empty() { self.pages } else { written as u64 };
                let sending = Duration::from_secs_f64(pages as f64 / LINK);
                let took = sending + Duration::from_millis(3);
                rounds.push(Round { pages, interval, took, sending, fixed: FIXED, throttle });
                assert!(rounds.len() < 100, "does not end: {rounds:#?}");
                match decide(rule, &rounds) {
                    Decision::Another => {}
                    Decision::Throttle(percent) => {
                        assert!(percent < throttle);
                        throttle = percent;
                    }
                    end => return (rounds, end),
                }
            }
        }
    }

    #[test]
    fn a_quiet_container_takes_two_rounds() {
        let idle = Load { pages: 1 << 20, rate: 0.0, working_set: 1.0 };
        let (rounds, end) = idle.run(&rule(20));
        assert_eq!((rounds.len(), end), (2, Decision::Freeze));
    }

    #[test]
    fn a_moderate_writer_converges() {
        let load = Load { pages: 1 << 20, rate: 20_000.0, working_set: 1e9 };
        let (rounds, end) = load.run(&rule(20));
        assert_eq!(end, Decision::Freeze);
        assert!(expected(&rounds) <= Duration::from_millis(20));
        assert!((3..8).contains(&rounds.len()), "{}", rounds.len());
        assert!(rounds.iter().all(|round| round.throttle == 100));
    }

    #[test]
    fn a_small_hot_set_is_left_to_the_freeze() {
        // 1500 pages are written over and over: 15 ms, and 5 ms are fixed. Just above the target, and not worth throttling.
        let load = Load { pages: 1 << 18, rate: 1e9, working_set: 1500.0 };
        let (rounds, end) = load.run(&rule(15));
        assert_eq!(end, Decision::Freeze);
        assert!(rounds.len() <= 5 && rounds.iter().all(|round| round.throttle == 100));
    }

    #[test]
    fn a_writer_faster_than_the_link_is_throttled() {
        let load = Load { pages: 1 << 18, rate: 150_000.0, working_set: 1e9 };
        let (rounds, end) = load.run(&rule(50));
        assert_eq!(end, Decision::Freeze);
        assert!(rounds.last().unwrap().throttle < 100);
        assert!(expected(&rounds) <= Duration::from_millis(100));
    }

    #[test]
    fn or_goes_over_to_post_copy() {
        let load = Load { pages: 1 << 18, rate: 150_000.0, working_set: 1e9 };
        let (rounds, end) = load.run(&Rule { post_copy: true, ..rule(50) });
        assert_eq!(end, Decision::PostCopy);
        assert!(rounds.iter().all(|round| round.throttle == 100));
    }

    #[test]
    fn or_it_is_said_why_it_does_not_move() {
        let load = Load { pages: 1 << 18, rate: 150_000.0, working_set: 1e9 };
        let (_, end) = load.run(&Rule { throttle: false, ..rule(50) });
        let Decision::GiveUp { why } = end else { panic!("{end:?}") };
        assert!(why.starts_with("more rounds do not help: it writes 585 MiB/s, and would stand still for "), "{why}");
        // Nothing slows down who writes by other means than its processor.
        let stubborn = |throttle| Round {
            pages: 100_000,
            interval: Duration::from_secs(1),
            took: Duration::from_secs(1),
            sending: Duration::from_secs(1),
            fixed: FIXED,
            throttle,
        };
        let rounds: Vec<Round> = [100, 50, 25, 12, 6].iter().flat_map(|&t| [stubborn(t); 4]).collect();
        let Decision::GiveUp { why } = decide(&rule(50), &rounds) else { panic!() };
        assert!(why.contains("even with 6 %"), "{why}");
    }

    #[test]
    fn a_target_that_is_only_a_wish_is_not_insisted_on() {
        let load = Load { pages: 1 << 18, rate: 1e9, working_set: 30_000.0 };
        let (_, end) = load.run(&Rule { throttle: false, ..rule(20) });
        assert!(matches!(end, Decision::GiveUp { .. }), "{end}");
        let (rounds, end) = load.run(&Rule { throttle: false, limit: Duration::from_secs(1), ..rule(20) });
        assert_eq!(end, Decision::Freeze);
        assert!(rounds.len() < 6);
    }

    #[test]
    fn time_is_limited() {
        let load = Load { pages: 1 << 20, rate: 90_000.0, working_set: 1e9 };
        let limited = Rule { max_time: Some(Duration::from_secs(20)), ..rule(20) };
        let (rounds, end) = load.run(&limited);
        assert!(matches!(&end, Decision::GiveUp { why } if why.starts_with("the time is over")), "{end:?}");
        assert!(rounds.iter().map(|round| round.took).sum::<Duration>() < Duration::from_secs(40));
        assert_eq!(load.run(&Rule { post_copy: true, ..limited }).1, Decision::PostCopy);
    }

    #[test]
    fn a_freeze_that_takes_long_by_itself_is_no_reason_to_go_on() {
        let slow = Duration::from_millis(200);
        let round = |pages| Round {
            pages,
            interval: Duration::from_millis(250),
            took: Duration::from_millis(250),
            sending: Duration::from_millis(10 + pages / 100),
            fixed: slow,
            throttle: 100,
        };
        assert_eq!(decide(&rule(20), &[round(1 << 18), round(50)]), Decision::Freeze);
    }

    #[test]
    fn every_load_comes_to_an_end() {
        for rate in [0.0, 1e2, 1e3, 1e4, 5e4, 8e4, 9.5e4, 1e5, 1.1e5, 1e6] {
            for working_set in [10.0, 1e3, 1e4, 1e5, 1e7] {
                for target in [1, 20, 500] {
                    for (post_copy, throttle) in [(false, false), (false, true), (true, false)] {
                        let load = Load { pages: 1 << 18, rate, working_set };
                        let (rounds, end) = load.run(&Rule { post_copy, throttle, ..rule(target) });
                        let fits = expected(&rounds) <= Duration::from_millis(target).max(FIXED * 5 / 4) * GOOD_ENOUGH;
                        assert_eq!(end == Decision::Freeze, fits, "{rate} {working_set} {target}: {end}");
                    }
                }
            }
        }
    }
}
