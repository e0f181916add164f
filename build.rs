//! Compiles the agent, `src/agent/main.rs`, which the library carries as bytes.
//!
//! It runs in containers of any image, so it is linked statically and on its own: no package of the
//! workspace could be, for Cargo has one set of flags for all that is built for a target.

use std::env;
use std::error::Error;
use std::path::PathBuf;
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/agent");
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");

    let mut rustc = Command::new(variable("RUSTC")?);
    rustc
        // The source is named by a relative path: the binary then holds none of this machine's.
        .current_dir(variable("CARGO_MANIFEST_DIR")?)
        .args(["--edition=2024", "--crate-name=agent", "--crate-type=bin"])
        .args(["-C", "target-feature=+crt-static", "-C", "relocation-model=static"])
        .args(["-C", "panic=abort", "-C", "opt-level=s", "-C", "codegen-units=1"])
        .args(["-C", "lto=fat", "-C", "strip=symbols"])
        .arg(format!("--target={}", variable("TARGET")?))
        .arg("-o")
        .arg(PathBuf::from(variable("OUT_DIR")?).join("agent"))
        .arg("src/agent/main.rs");
    if let Ok(linker) = variable("RUSTC_LINKER") {
        rustc.arg(format!("-Clinker={linker}"));
    }
    if !rustc.status()?.success() {
        return Err("the agent could not be compiled; it is linked statically, which takes the C \
                    library's static files (Debian: libc6-dev, Fedora: glibc-static)"
            .into());
    }
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}
