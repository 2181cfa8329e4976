//! Sets of pages.

use std::collections::BTreeMap;

use crate::image::pages::Span;

/// Addresses that belong to a set, as intervals that neither touch nor overlap: start to end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spans(BTreeMap<u64, u64>);

impl Spans {
    pub fn insert(&mut self, span: Span) {
        let (mut start, mut end) = (span.vaddr, span.end());
        if start == end {
            return;
        }
        // Those that touch it become one with it.
        while let Some((&s, &e)) = self.0.range(..=end).next_back().filter(|(_, e)| **e >= start) {
            self.0.remove(&s);
            (start, end) = (start.min(s), end.max(e));
        }
        self.0.insert(start, end);
    }

    pub fn remove(&mut self, span: Span) {
        let (start, end) = (span.vaddr, span.end());
        if start == end {
            return;
        }
        while let Some((&s, &e)) = self.0.range(..end).next_back().filter(|(_, e)| **e > start) {
            self.0.remove(&s);
            if s < start {
                self.0.insert(s, start);
            }
            if e > end {
                self.0.insert(end, e);
            }
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = Span> {
        self.0.iter().map(|(s, e)| Span::between(*s, *e))
    }

    /// The parts of `span` in ascending order, each with whether it is in the set.
    pub fn split(&self, span: Span) -> Vec<(Span, bool)> {
        let mut parts = Vec::new();
        let mut at = span.vaddr;
        let first = self.0.range(..=at).next_back().map_or(at, |(s, _)| *s);
        for (&s, &e) in self.0.range(first..span.end()) {
            let Some(inside) = Span::between(s, e).cut(span) else { continue };
            if at < inside.vaddr {
                parts.push((Span::between(at, inside.vaddr), false));
            }
            parts.push((inside, true));
            at = inside.end();
        }
        if at < span.end() {
            parts.push((Span::between(at, span.end()), false));
        }
        parts
    }

    /// What is in this set and not in the other.
    pub fn without(&self, other: &Spans) -> Vec<Span> {
        let parts = self.iter().flat_map(|span| other.split(span));
        parts.filter(|(_, inside)| !inside).map(|(span, _)| span).collect()
    }
}

impl FromIterator<Span> for Spans {
    fn from_iter<I: IntoIterator<Item = Span>>(all: I) -> Spans {
        let mut spans = Spans::default();
        all.into_iter().for_each(|span| spans.insert(span));
        spans
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn span(from: u64, to: u64) -> Span {
        Span::between(from * 4096, to * 4096)
    }

    /// Against a set of single pages, with every small interval in a scrambled order.
    #[test]
    fn a_set_of_intervals_is_a_set() {
        let (mut spans, mut pages) = (Spans::default(), BTreeSet::new());
        let mut seed = 7u64;
        for _ in 0..5000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (from, len, add) = ((seed >> 33) % 40, (seed >> 40) % 6, seed >> 60 < 9);
            let s = span(from, from + len);
            if add {
                spans.insert(s);
                pages.extend(from..from + len);
            } else {
                spans.remove(s);
                pages.retain(|p| !(from..from + len).contains(p));
            }
            let listed: BTreeSet<u64> = spans.iter().flat_map(Span::addresses).map(|a| a / 4096).collect();
            assert_eq!(listed, pages);
            let all: Vec<Span> = spans.iter().collect();
            assert!(all.windows(2).all(|w| w[0].end() < w[1].vaddr), "{all:?}");
            for (part, inside) in spans.split(span(5, 25)) {
                assert!(part.addresses().all(|a| pages.contains(&(a / 4096)) == inside));
            }
        }
    }

    #[test]
    fn a_difference() {
        let (a, b): (Spans, Spans) =
            ([span(0, 10)].into_iter().collect(), [span(2, 3), span(9, 12)].into_iter().collect());
        assert_eq!(a.without(&b), [span(0, 2), span(3, 9)]);
        assert_eq!(b.without(&a), [span(10, 12)]);
    }
}
