// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Debian packages, fetched and unpacked without touching the system.
//!
//! A private apt state folder holds the machine's own Debian sources plus the backports suite of the same
//! mirror. Packages are verified as apt always does, downloaded and unpacked with `dpkg -x`, never installed.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{paths, process};

/// The Debian release that is supported and tested.
pub const RELEASE: &str = "bookworm";
/// Its backports suite.
pub const BACKPORTS: &str = "bookworm-backports";

/// Older lists may name packages that the mirror has replaced since.
const LISTS_AGE: Duration = Duration::from_secs(12 * 3600);

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt with a state of its own.
#[derive(Debug)]
pub struct PrivateApt {
    dir: PathBuf,
}

/// One suite of one mirror, as apt itself understood its configuration.
struct Source {
    uri: String,
    suite: String,
    component: String,
}

/// Asks apt for its sources, so that one-line and deb822 files and every apt option are read by apt, not by us.
fn system_sources() -> Result<Vec<Source>> {
    let text = process::run(Command::new(paths::tool("apt-get")?).args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE) $(COMPONENT)",
        "Created-By: Packages",
    ]))?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace().map(str::to_owned);
            Some(Source { uri: words.next()?, suite: words.next()?, component: words.next()? })
        })
        .collect())
}

/// The sources file of the private state: the release's own suites, and backports from where the release comes from.
fn private_sources(system: &[Source]) -> Result<String> {
    let main = system
        .iter()
        .find(|source| source.suite == RELEASE && source.component == "main")
        .with_context(|| format!("apt has no source for Debian 12 ({RELEASE} main) on this machine"))?;
    let mut lines = BTreeSet::new();
    let mut add = |uri: &str, suite: &str| {
        lines.insert(format!("deb [signed-by={KEYRING}] {uri} {suite} main"));
    };
    for source in system {
        if source.suite.starts_with(RELEASE) && source.component == "main" {
            add(&source.uri, &source.suite);
        }
    }
    add(&main.uri, BACKPORTS);
    Ok(lines.into_iter().fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "{line}");
        text
    }))
}

impl PrivateApt {
    /// Sets the state folder up and reads the package lists if it has none of today.
    pub fn open() -> Result<Self> {
        let dir = paths::cache_dir()?.join("apt");
        for sub in ["state/lists/partial", "cache/archives/partial", "parts"] {
            fs::create_dir_all(dir.join(sub))
                .with_context(|| format!("create {sub} in {}", dir.display()))?;
        }
        let apt = Self { dir };
        let sources = private_sources(&system_sources()?)?;
        fs::write(apt.dir.join("sources.list"), sources)?;
        // As if nothing were installed: what this machine happens to have must not choose a version.
        fs::write(apt.dir.join("status"), "")?;
        let dir = apt.dir.display();
        fs::write(
            apt.dir.join("apt.conf"),
            format!(
                "Dir::State \"{dir}/state\";\n\
                 Dir::State::status \"{dir}/status\";\n\
                 Dir::Cache \"{dir}/cache\";\n\
                 Dir::Etc::sourcelist \"{dir}/sources.list\";\n\
                 Dir::Etc::sourceparts \"{dir}/parts\";\n\
                 APT::Sandbox::User \"root\";\n"
            ),
        )?;
        let age = fs::metadata(apt.dir.join("updated")).and_then(|meta| meta.modified());
        let fresh = age.is_ok_and(|time| time.elapsed().is_ok_and(|age| age < LISTS_AGE));
        if !fresh {
            apt.update()?;
        }
        Ok(apt)
    }

    fn command(&self, tool: &str) -> Result<Command> {
        let mut command = Command::new(paths::tool(tool)?);
        command.env("APT_CONFIG", self.dir.join("apt.conf")).env("LC_ALL", "C.UTF-8");
        Ok(command)
    }

    /// Reads the package lists again.
    pub fn update(&self) -> Result<()> {
        eprintln!("reading Debian's package lists into {}", self.dir.display());
        process::run(self.command("apt-get")?.args(["update", "-q"]))?;
        fs::write(self.dir.join("updated"), "")?;
        Ok(())
    }

    /// The packages that `package` of `suite` depends on, by name. [`RELEASE`] includes its security updates.
    pub fn depends(&self, package: &str, suite: &str) -> Result<Vec<String>> {
        let mut command = self.command("apt-cache")?;
        command.arg("depends");
        if suite != RELEASE {
            command.args(["-t", suite]);
        }
        let text = process::run(command.arg(package))?;
        Ok(text
            .lines()
            .filter_map(|line| line.trim().trim_start_matches('|').strip_prefix("Depends: "))
            .map(str::to_owned)
            .collect())
    }

    /// What installing `package` from `suite` would add to this system, as `name=version`: the package and each
    /// dependency that the system lacks or has too old.
    pub fn missing_closure(&self, package: &str, suite: &str) -> Result<Vec<String>> {
        let found = self.lacking(package, suite)?;
        if found.is_empty() {
            bail!("apt would install nothing for {package} from {suite}");
        }
        Ok(found)
    }

    /// As [`PrivateApt::missing_closure`], of a package that the system may have: then it is nothing.
    pub fn lacking(&self, package: &str, suite: &str) -> Result<Vec<String>> {
        let text = process::run(self.command("apt-get")?.args([
            "-o",
            "Dir::State::status=/var/lib/dpkg/status",
            "install",
            "--simulate",
            "--no-install-recommends",
            "-t",
            suite,
            package,
        ]))?;
        // Inst NAME [OLD VERSION] (NEW VERSION ORIGIN [ARCH]) …
        Ok(text
            .lines()
            .filter_map(|line| {
                let line = line.strip_prefix("Inst ")?;
                let name = line.split_whitespace().next()?;
                let version = line.split_once('(')?.1.split_whitespace().next()?;
                Some(format!("{name}={version}"))
            })
            .collect())
    }

    /// Downloads `packages` (`name` or `name=version`) and unpacks them all below `into`.
    pub fn unpack(&self, packages: &[String], into: &Path) -> Result<()> {
        let debs = tempfile::Builder::new().prefix("debs-").tempdir_in(&self.dir)?;
        eprintln!("fetching {}", packages.join(" "));
        let mut download = self.command("apt-get")?;
        download.current_dir(debs.path()).args(["download", "-q"]).args(packages);
        process::run(&mut download)?;
        let mut found = 0;
        for deb in fs::read_dir(debs.path())? {
            let deb = deb?.path();
            process::run(Command::new(paths::tool("dpkg")?).arg("-x").arg(&deb).arg(into))?;
            found += 1;
        }
        if found != packages.len() {
            bail!("asked for {} packages, got {found}", packages.len());
        }
        Ok(())
    }
}

/// Makes `<cache>/<name>` with `fill` if it is not there; a half-filled folder is never seen under that name.
pub fn cached_tree(name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let cache = paths::cache_dir()?;
    let done = cache.join(name);
    if done.exists() {
        return Ok(done);
    }
    let _lock = paths::lock_cache("unpack")?;
    if !done.exists() {
        let partial = cache.join(format!("{name}.partial"));
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        fs::create_dir_all(&partial)?;
        fill(&partial).with_context(|| format!("make {}", done.display()))?;
        fs::rename(&partial, &done)?;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uri: &str, suite: &str, component: &str) -> Source {
        Source { uri: uri.into(), suite: suite.into(), component: component.into() }
    }

    #[test]
    fn backports_come_from_the_mirror_of_the_release() {
        let text = private_sources(&[
            source("http://security.example/debian-security/", "bookworm-security", "main"),
            source("http://mirror.example/debian/", "bookworm", "main"),
            source("http://other.example/repo/", "nodistro", "main"),
        ])
        .unwrap();
        assert!(text.contains("] http://mirror.example/debian/ bookworm-backports main\n"), "{text}");
        assert!(text.contains("] http://security.example/debian-security/ bookworm-security main\n"));
        assert!(!text.contains("other.example"));
    }

    #[test]
    fn a_machine_without_debian_12_sources_is_told_so() {
        let error =
            private_sources(&[source("http://mirror.example/debian/", "trixie", "main")]).unwrap_err();
        assert!(error.to_string().contains("Debian 12"), "{error}");
    }
}
