//! What a job sees and can do, told from inside; and the attacker that the tests and the demo run.
//!
//! `probe VERB [ARG…]`. Verbs that take without end stop by themselves a few steps past the limit that they are told,
//! so that they do no harm outside of a sandbox: the last argument of each says when.

mod appetite;
mod reach;
mod report;
mod sys;

use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(io::stderr(), "probe: {error}");
            ExitCode::from(2)
        }
    }
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn run(words: &[&str]) -> Result<ExitCode> {
    match words {
        // what is there
        ["report"] => say(&report::everything().to_string())?,
        ["report-and-wait"] => {
            say(&report::everything().to_string())?;
            io::copy(&mut io::stdin(), &mut io::sink())?;
        }
        ["list", dir] => say(&reach::list(dir)?.to_string())?,
        ["args"] => say(&serde_json::to_string(&std::env::args().collect::<Vec<_>>())?)?,

        // what can be reached
        ["open", paths @ ..] => say(&reach::open(paths).to_string())?,
        ["writable", root] => say(&reach::writable(root).to_string())?,
        ["forbidden-calls"] => say(&reach::forbidden_calls().to_string())?,
        ["sockets"] => say(&reach::sockets().to_string())?,
        ["lock", path, ms] => reach::lock(path, Duration::from_millis(ms.parse()?))?,
        ["keep", name] => reach::keep(name)?,
        ["strike-init"] => reach::strike_init()?,
        ["forge", code] => {
            reach::forge()?;
            return Ok(ExitCode::from(code.parse::<u8>()?));
        }

        // how a program ends
        ["exit", code] => return Ok(ExitCode::from(code.parse::<u8>()?)),
        ["abort"] => std::process::abort(),
        ["signal", number] => sys::raise(number.parse()?)?,
        ["segfault"] => sys::segfault(),
        ["x32-call"] => say(&sys::x32_call().to_string())?,
        ["i386-call"] => say(&sys::i386_call().to_string())?,
        ["overflow-stack"] => return Ok(ExitCode::from(u8::from(appetite::overflow_stack(0) == 0))),

        // how long
        ["sleep", ms] => std::thread::sleep(Duration::from_millis(ms.parse()?)),
        ["spin", ms] => spin(Duration::from_millis(ms.parse()?)),
        ["spin-in-grandchild", ms] => appetite::in_grandchild(|| spin(Duration::from_millis(ms.parse().unwrap_or(0))))?,
        ["spin-threads", threads, ms] => appetite::spin_threads(threads.parse()?, Duration::from_millis(ms.parse()?)),

        // how much
        ["allocate", mib] => say(&appetite::allocate(mib.parse()?).to_string())?,
        ["allocate-in-child", mib] => say(&appetite::allocate_in_child(mib.parse()?)?.to_string())?,
        ["fork", most] => say(&appetite::fork_until_refused(most.parse()?).to_string())?,
        ["fork-bomb", most] => appetite::fork_bomb(most.parse()?),
        ["threads", most] => say(&appetite::threads_until_refused(most.parse()?).to_string())?,
        ["open-files", most] => say(&appetite::open_until_refused(most.parse()?)?)?,
        ["write-tmp", bytes] => say(&appetite::write_until_refused(bytes.parse()?)?)?,
        ["make-files", most] => say(&appetite::make_files_until_refused(most.parse()?)?)?,
        ["flood", stream, mib] => appetite::flood(stream, mib.parse()?)?,
        ["hold-output", ms] => appetite::hold_output(Duration::from_millis(ms.parse()?))?,

        // what goes in and out
        ["cat"] => drop(io::copy(&mut io::stdin(), &mut io::stdout())?),
        ["count"] => say(&io::copy(&mut io::stdin(), &mut io::sink())?.to_string())?,
        ["read", bytes] => {
            let mut taken = Vec::new();
            io::stdin().take(bytes.parse()?).read_to_end(&mut taken)?;
            say(&taken.len().to_string())?;
        }
        ["stderr", text] => io::stderr().write_all(text.as_bytes())?,
        _ => return Err(format!("no verb {words:?}").into()),
    }
    Ok(ExitCode::SUCCESS)
}

fn say(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}
