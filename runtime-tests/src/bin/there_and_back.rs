//! `make test-there-and-back`: a Redis with a client goes back and forth, and nothing grows. Ends with 1 when anything did.

use std::process::ExitCode;

use runtime_tests::there_and_back::run;

fn main() -> ExitCode {
    let rounds = std::env::args().nth(1).map_or(Some(100), |text| text.parse().ok());
    let Some(rounds) = rounds else {
        eprintln!("usage: there_and_back [ROUNDS]");
        return ExitCode::from(2);
    };
    match run(rounds, |step| eprintln!("{step}")) {
        Ok(result) => {
            println!("{result}");
            if result.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(e) => {
            eprintln!("there_and_back: {e}");
            ExitCode::FAILURE
        }
    }
}
