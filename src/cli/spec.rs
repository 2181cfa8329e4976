//! `lmrun spec`

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use super::report::Failure;

/// The container that runc's `spec` describes: a shell on a read-only root.
const CONFIG: &str = include_str!("spec.json");

/// Write a config.json to start from
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory for config.json
    #[arg(short, long, default_value = ".")]
    bundle: PathBuf,
}

impl Args {
    pub fn run(&self) -> Result<u8, Failure> {
        let path = self.bundle.join("config.json");
        let written = OpenOptions::new()
            .create_new(true)
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(CONFIG.as_bytes()));
        written.map_err(|e| Failure::new(format!("cannot write {}", path.display()), e))?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::CONFIG;
    use oci_spec::runtime::Spec;

    #[test]
    fn the_text_is_a_spec_of_version_1() {
        let spec: Spec = serde_json::from_str(CONFIG).unwrap();
        assert!(spec.version().starts_with("1."));
        assert_eq!(spec.process().as_ref().unwrap().args().as_deref(), Some(&["sh".to_owned()][..]));
    }
}
