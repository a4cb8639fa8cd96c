//! Others that do a part of what Holm does, where this machine has them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::load::Requests;
use super::programs::empty_program;
use super::server::stop;

/// A program that runs the empty one in namespaces of its own.
pub struct Peer {
    pub name: &'static str,
    command: Command,
}

impl Peer {
    /// All that there are, with what they need in `dir`; of the others why they are absent.
    pub fn find(dir: &Path) -> [Result<Self, String>; 3] {
        let root = dir.join("rootfs");
        for name in ["", "proc", "dev", "sys", "tmp"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::write(root.join("program"), empty_program()).unwrap();
        fs::set_permissions(root.join("program"), fs::Permissions::from_mode(0o755)).unwrap();
        [Self::oci("crun", dir), Self::oci("runc", dir), Self::bwrap(&root)]
    }

    /// With the bundle that the program itself makes: five namespaces, all of it but what runs as it comes.
    fn oci(name: &'static str, dir: &Path) -> Result<Self, String> {
        let path = find(name)?;
        let bundle = dir.join(name);
        fs::create_dir(&bundle).unwrap();
        let made = Command::new(&path).arg("spec").current_dir(&bundle).output();
        let text = fs::read_to_string(bundle.join("config.json"));
        let text = text.map_err(|_| format!("`{name} spec` made none: {made:?}"))?;
        let mut spec: serde_json::Value = serde_json::from_str(&text).unwrap();
        spec["process"]["args"] = serde_json::json!(["/program"]);
        spec["process"]["terminal"] = false.into();
        spec["root"]["path"] = dir.join("rootfs").to_str().into();
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let mut command = Command::new(path);
        command.arg("run").arg("--bundle").arg(&bundle).arg(format!("holm-bench-{}", std::process::id()));
        Self { name, command }.that_works()
    }

    /// With as many namespaces as a job has.
    fn bwrap(root: &Path) -> Result<Self, String> {
        let mut command = Command::new(find("bwrap")?);
        command.arg("--unshare-all").arg("--ro-bind").arg(root).args(["/", "--proc", "/proc", "--dev", "/dev"]);
        command.args(["--tmpfs", "/tmp", "/program"]);
        Self { name: "bwrap", command }.that_works()
    }

    fn that_works(mut self) -> Result<Self, String> {
        match self.command.stdin(Stdio::null()).output() {
            Ok(output) if output.status.success() => Ok(self),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                let line = said.lines().last().unwrap_or_default().replace('|', "/");
                Err(format!("`{}` does not work here: {}, {line}", self.name, output.status))
            }
            Err(error) => Err(format!("`{}` does not work here: {error}", self.name)),
        }
    }

    /// Runs the empty program.
    pub fn run(&mut self) {
        let status = self.command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        assert!(status.success(), "{} {status}", self.name);
    }
}

/// `wasmtime serve` with a component.
pub struct WasmtimeServe {
    child: Child,
    pub requests: Requests,
    _dir: tempfile::TempDir,
}

impl WasmtimeServe {
    /// Starts it: `HOLM_BENCH_WASMTIME`, or what is found by its name.
    ///
    /// # Errors
    /// Why it is absent.
    pub fn start(component: &[u8]) -> Result<Self, String> {
        let path = std::env::var_os("HOLM_BENCH_WASMTIME").map_or_else(|| find("wasmtime"), |path| Ok(path.into()))?;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("component.wasm");
        fs::File::create(&file).unwrap().write_all(component).unwrap();
        let mut command = Command::new(path);
        command.args(["serve", "-Scli", "--addr", "127.0.0.1:0"]).arg(file);
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.map_err(|error| format!("start `wasmtime`: {error}"))?;
        let mut said = String::new();
        // it says where it listens, and nothing more
        let _ = BufReader::new(child.stderr.take().unwrap()).read_line(&mut said);
        let Some((_, url)) = said.trim().split_once("http://") else {
            stop(&mut child);
            return Err(format!("`wasmtime serve` does not work here: {}", said.trim()));
        };
        Ok(Self { child, requests: Requests::new(url, "/", None), _dir: dir })
    }
}

impl Drop for WasmtimeServe {
    fn drop(&mut self) {
        stop(&mut self.child);
    }
}

fn find(name: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
    found.ok_or_else(|| format!("no `{name}` in PATH"))
}
