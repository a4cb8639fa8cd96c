//! What a job sees and can do, told from inside; and the attacker that the tests and the demo run.
//!
//! `probe VERB [ARG…]`. Verbs that take without end stop by themselves a few steps past the limit that they are told,
//! so that they do no harm outside of a sandbox: the last argument of each says when.

mod appetite;
mod calls;
mod escape;
mod hoard;
mod kernel;
mod obey;
mod quota;
mod raw;
mod reach;
mod report;
mod shares;
mod sys;
mod wrapped;

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

        // ways out that set-up code left open
        ["on-own-ground", rest @ ..] => raw::on_own_ground(|| run(rest).map(drop))?,
        ["leak", dir, rest @ ..] => {
            escape::leak(dir)?;
            return run(rest);
        }
        ["overwrite-program", pid] => say(&escape::overwrite_program(pid)?.to_string())?,
        ["descriptors"] => say(&escape::descriptors().to_string())?,
        ["ground"] => say(&escape::ground()?.to_string())?,
        ["replace", paths @ ..] => say(&escape::replace(paths).to_string())?,
        ["plant-links", dir, target] => escape::plant_links(dir, target)?,
        ["disguise-output", dir, target] => escape::disguise_output(dir, target)?,
        ["deep-and-wide", most] => say(&escape::deep_and_wide(most.parse()?)?.to_string())?,
        ["connect", targets @ ..] => say(&escape::connect(targets).to_string())?,
        ["regain-privilege"] => say(&escape::regain_privilege()?.to_string())?,
        ["effective-id"] => return Ok(ExitCode::from(sys::effective_id())),
        ["search-memory", reversed] => say(&escape::search_memory(reversed)?.to_string())?,
        ["leave-core"] => say(&escape::leave_core()?.to_string())?,
        ["open-for-writing", root] => say(&escape::open_for_writing(root).to_string())?,

        // ways into the kernel
        ["sweep", first, end, patterns, spared @ ..] => {
            let spared: Vec<usize> =
                spared.iter().map(|number| number.parse()).collect::<std::result::Result<_, _>>()?;
            say(&calls::sweep(first.parse()?, end.parse()?, patterns.parse()?, &spared)?.to_string())?;
        }
        ["vary", number, at, args, values @ ..] => say(&calls::vary(number, at, args, values)?.to_string())?,
        ["known-requests", path] => say(&calls::known_requests(path)?.to_string())?,
        ["fuzz", count, seed] => say(&calls::fuzz(count.parse()?, seed.parse()?)?.to_string())?,
        ["namespaces"] => say(&kernel::namespaces()?.to_string())?,
        ["mounts"] => say(&kernel::mounts()?.to_string())?,
        ["release-agent"] => say(&kernel::release_agent()?.to_string())?,
        ["rings"] => say(&kernel::rings().to_string())?,
        ["keys"] => say(&kernel::keys()?.to_string())?,
        ["page-games"] => say(&kernel::page_games()?.to_string())?,
        ["attach", pid] => say(&kernel::attach(pid.parse()?)?.to_string())?,
        ["type-keys"] => say(&kernel::type_keys()?.to_string())?,
        ["out-of-band"] => say(&kernel::out_of_band()?.to_string())?,
        ["nodes"] => say(&kernel::nodes()?.to_string())?,
        ["socket-matrix", families, kinds, protocols @ ..] => {
            let protocols: Vec<usize> =
                protocols.iter().map(|one| one.parse()).collect::<std::result::Result<_, _>>()?;
            say(&kernel::socket_matrix(families.parse()?, kinds.parse()?, &protocols).to_string())?;
        }

        // how a program ends
        ["exit", code] => return Ok(ExitCode::from(code.parse::<u8>()?)),
        ["abort"] => std::process::abort(),
        ["abort-in-thread"] => std::thread::scope(|scope| drop(scope.spawn(|| std::process::abort()).join())),
        ["exit-in-thread", code] => {
            let code = code.parse()?;
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20)); // the first thread is gone by then
                sys::exit_now(code)
            });
            sys::exit_thread()
        }
        ["signal", number] => sys::raise(number.parse()?)?,
        ["signal-in-grandchild", number] => {
            let number = number.parse()?;
            appetite::in_grandchild(|| drop(sys::raise(number)))?;
        }
        ["killed-by-child"] => reach::killed_by_child()?,
        ["close-streams", code] => {
            sys::close_streams();
            return Ok(ExitCode::from(code.parse::<u8>()?));
        }
        ["segfault"] => sys::segfault(),
        ["x32-call"] => say(&sys::x32_call().to_string())?,
        ["i386-call"] => say(&sys::i386_call().to_string())?,
        ["use-stack", kib] => {
            // the standard library would tell of an overflow in words of its own, and abort
            sys::default_action(libc::SIGSEGV);
            say(&appetite::use_stack(kib.parse()?).to_string())?;
        }

        // when and how long
        ["after-input", rest @ ..] => {
            io::copy(&mut io::stdin(), &mut io::sink())?;
            return run(rest);
        }
        ["tell-time", rest @ ..] => {
            say(&std::time::UNIX_EPOCH.elapsed()?.as_micros().to_string())?;
            return run(rest);
        }
        ["sleep", ms] => std::thread::sleep(Duration::from_millis(ms.parse()?)),
        ["spin", ms] => spin(Duration::from_millis(ms.parse()?)),
        ["spin-in-grandchild", ms] => appetite::in_grandchild(|| spin(Duration::from_millis(ms.parse().unwrap_or(0))))?,
        ["burn", ms] => burn(Duration::from_millis(ms.parse()?)),
        ["burn-in-grandchild", ms] => appetite::in_grandchild(|| burn(Duration::from_millis(ms.parse().unwrap_or(0))))?,
        ["spin-on", cpu, ms] => {
            sys::stay_on(cpu.parse()?)?;
            spin(Duration::from_millis(ms.parse()?));
        }
        ["spin-threads", threads, ms] => appetite::spin_threads(threads.parse()?, Duration::from_millis(ms.parse()?)),

        // how much
        ["allocate", mib] => say(&appetite::allocate(mib.parse()?).to_string())?,
        ["allocate-and-wait", mib] => appetite::allocate_and_wait(mib.parse()?)?,
        ["allocate-in-child", mib] => say(&appetite::allocate_in_child(mib.parse()?)?.to_string())?,
        ["allocate-in-grandchild", mib] => {
            let mib = mib.parse()?;
            appetite::in_grandchild(|| _ = appetite::allocate(mib))?;
            std::thread::sleep(Duration::from_secs(5));
        }
        ["fork", most] => say(&appetite::fork_until_refused(most.parse()?).to_string())?,
        ["fork-bomb", most] => appetite::fork_bomb(most.parse()?),
        ["threads", most] => say(&appetite::threads_until_refused(most.parse()?).to_string())?,
        ["open-files", most] => say(&appetite::open_until_refused(most.parse()?)?)?,
        ["write-tmp", bytes] => say(&appetite::write_until_refused(bytes.parse()?)?)?,
        ["fill-tmp-and-wait"] => say(&appetite::fill_tmp_and_wait()?.to_string())?,
        ["make-files", most] => say(&appetite::make_files_until_refused(most.parse()?)?)?,
        ["flood", stream, mib] => appetite::flood(stream, mib.parse()?)?,
        ["leave-behind", children, ms] => {
            appetite::leave_behind(children.parse()?, Duration::from_millis(ms.parse()?))?;
        }
        ["hold-output", ms] => appetite::hold_output(Duration::from_millis(ms.parse()?))?,

        // what a user has of the kernel, and where two jobs could meet
        ["take", kind, most] => quota::take(kind, most.parse()?)?,
        ["lock-all", paths @ ..] => quota::lock_all(paths)?,
        ["listen", name] => quota::listen(name)?,
        ["hear", name] => quota::connect(name)?,
        ["leave", name, key] => quota::leave(name, key.parse()?)?,
        ["find", name, key] => quota::find(name, key.parse()?)?,
        ["mark", seed, mib] => quota::mark(seed.parse()?, mib.parse()?)?,
        ["mark-and-search", seed, mib] => quota::mark_and_search(seed.parse()?, mib.parse()?)?,
        ["search", seed] => quota::search(seed.parse()?)?,
        ["sharing"] => quota::sharing()?,
        ["storm", ms] => quota::storm(Duration::from_millis(ms.parse()?))?,
        ["clock-step"] => say(&quota::clock_step().as_nanos().to_string())?,
        ["speculation"] => quota::speculation()?,

        // the kernel's memory and work
        ["hoard", kind, most] => hoard::hoard(kind, most.parse()?)?,
        ["large-files", bytes] => hoard::large_files(bytes.parse()?)?,
        ["off-account"] => hoard::off_account()?,
        ["nest-epoll", most] => hoard::nest_epoll(most.parse()?)?,
        ["zombies", most] => hoard::zombies(most.parse()?)?,
        ["orphans", most] => hoard::orphans(most.parse()?)?,
        ["dodge", way, ms] => hoard::dodge(way, Duration::from_millis(ms.parse()?))?,
        ["drip", bytes, pause_us] => hoard::drip(bytes.parse()?, Duration::from_micros(pause_us.parse()?))?,
        ["hide", ms] => hoard::hide(Duration::from_millis(ms.parse()?))?,

        // what controllers divide
        ["cpus", threads, ms] => say(&shares::cpus(threads.parse()?, Duration::from_millis(ms.parse()?)).to_string())?,
        ["direct", way, path, block, ms] => {
            say(&shares::direct(way, path, block.parse()?, Duration::from_millis(ms.parse()?))?.to_string())?;
        }
        ["node", path, ways @ ..] => say(&shares::node(path, ways)?.to_string())?,
        ["make-node", path, major, minor] => {
            say(&shares::make_node(path, major.parse()?, minor.parse()?)?.to_string())?;
        }
        ["huge-map", bytes] => say(&shares::huge_map(bytes.parse()?).to_string())?,
        ["packet"] => say(&shares::packet()?.to_string())?,

        // what is done to it while it runs
        ["obey"] => say(&obey::obey()?.to_string())?,
        ["converse", ms] => say(&obey::converse(Duration::from_millis(ms.parse()?))?.to_string())?,
        ["odd-name"] => {
            wrapped::rename(&b"a b\n\\\xff\"\x1bc"[..]);
            io::copy(&mut io::stdin(), &mut io::sink())?;
        }
        ["park-in-vfork", ms] => obey::park_in_vfork(Duration::from_millis(ms.parse()?))?,

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

/// Uses CPU time until this process has had so much, however long that takes.
pub(crate) fn burn(time: Duration) {
    while sys::cpu_time() < time {
        std::hint::spin_loop();
    }
}

pub(crate) fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}
