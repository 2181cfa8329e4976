//! How mounts pass on what is mounted below them. libcontainer resets it while it makes the root, so it is seen to when that
//! is made.

use std::collections::HashMap;
use std::path::PathBuf;

use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::mount::{MsFlags, mount};
use oci_spec::runtime::Spec;

use super::lexical;
use super::options::Options;

/// An executor that sees to it first, with the container's root as its own.
#[derive(Clone)]
pub struct Propagation {
    executor: Box<dyn Executor>,
    /// Mount points, and what is set there in turn.
    wanted: Vec<(PathBuf, Vec<MsFlags>)>,
}

impl Propagation {
    /// `executor` itself where `spec` asks for nothing.
    pub fn before(executor: Box<dyn Executor>, spec: &Spec) -> Box<dyn Executor> {
        let mounts = spec.mounts().iter().flatten();
        let wanted: Vec<_> = mounts
            .map(|mount| {
                let options = Options::parse(mount.options().as_deref().unwrap_or_default());
                (lexical(mount.destination()), options.propagation)
            })
            .filter(|(_, flags)| !flags.is_empty())
            .collect();
        if wanted.is_empty() { executor } else { Box::new(Propagation { executor, wanted }) }
    }

    fn set(&self) -> Result<(), String> {
        for (at, all) in &self.wanted {
            for flags in all {
                mount(None::<&str>, at, None::<&str>, *flags, None::<&str>)
                    .map_err(|e| format!("set the propagation of {}: {e}", at.display()))?;
            }
        }
        Ok(())
    }
}

impl Executor for Propagation {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        self.executor.exec(spec)
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        self.set().map_err(ExecutorValidationError::ArgValidationError)?;
        self.executor.validate(spec)
    }

    fn setup_envs(&self, envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        self.executor.setup_envs(envs)
    }
}
