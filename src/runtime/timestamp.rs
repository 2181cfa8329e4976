//! RFC 3339 timestamps in UTC, as runc's state files and logs have them.

use std::time::{SystemTime, UNIX_EPOCH};

/// `at` with nanoseconds: `2024-02-29T12:34:56.123456789Z`. Times before 1970 give the epoch.
pub fn rfc3339_nanos(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}.{:09}Z", date_and_time(since.as_secs()), since.subsec_nanos())
}

/// `at` in whole seconds: `2024-02-29T12:34:56Z`.
pub fn rfc3339(at: SystemTime) -> String {
    format!("{}Z", date_and_time(at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()))
}

/// Days to a civil date by counting years from 1 March, so that leap days come last.
fn date_and_time(seconds: u64) -> String {
    let days = seconds / 86_400 + 719_468; // since 0000-03-01
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn known_instants() {
        let at = |s| rfc3339(UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_709_210_096), "2024-02-29T12:34:56Z");
        assert_eq!(at(4_107_542_399), "2100-02-28T23:59:59Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
        assert_eq!(rfc3339_nanos(UNIX_EPOCH + Duration::from_nanos(5)), "1970-01-01T00:00:00.000000005Z");
    }
}
