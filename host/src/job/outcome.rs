//! How a job ended, in the words of the API, judged from what the kernel, the sandbox and the server's own watchers
//! know.

use holm_runtime::invocation::{Report, WasmEnd};
use holm_sandbox::usage::{Exit, KillCause, SandboxReport};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::limit::{Limit, Limits, Runtime};

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Outcome {
    /// Its main process ended by itself.
    Exited {
        /// With this code; 0 is success.
        exit_code: i32,
    },
    /// Its main process was ended by a signal that the host did not send.
    Signaled {
        /// The signal's number.
        signal: i32,
    },
    /// WebAssembly trapped.
    Trapped {
        /// The engine's code for it.
        trap: String,
        /// The guest's stack, innermost frame first.
        backtrace: String,
    },
    /// It reached a limit that ends jobs.
    OverLimit {
        /// The limit's key.
        limit: &'static str,
        /// The limit's value.
        #[schema(value_type = f64)]
        allowed: Value,
        /// What the job reached, in the same unit.
        #[schema(value_type = f64)]
        reached: Value,
    },
    /// Somebody ended it: a cancel, a client that hung up, the deletion of its plugin.
    Cancelled,
    /// The artifact turned out not to run.
    NotRunnable {
        /// Why.
        reason: String,
    },
    /// The host failed.
    Lost,
}

impl Outcome {
    /// The outcome's name.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Exited { .. } => "exited",
            Self::Signaled { .. } => "signaled",
            Self::Trapped { .. } => "trapped",
            Self::OverLimit { .. } => "over_limit",
            Self::Cancelled => "cancelled",
            Self::NotRunnable { .. } => "not_runnable",
            Self::Lost => "lost",
        }
    }

    /// Whether the job did what it was to do.
    #[must_use]
    pub fn is_success(&self) -> bool {
        *self == Self::Exited { exit_code: 0 }
    }

    /// The key of the limit that ended it, if one did.
    #[must_use]
    pub fn limit(&self) -> Option<&'static str> {
        match self {
            Self::OverLimit { limit, .. } => Some(limit),
            _ => None,
        }
    }
}

/// Why the server stopped a job. The first reason stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// By order, or because nobody waits for it any more.
    Cancelled,
    /// Its client stopped sending its input, or sent it too slowly.
    InputBroken,
    /// Its input is longer than `input_bytes` was.
    InputOver {
        /// So many bytes had come.
        reached: u64,
        /// So many were allowed then.
        allowed: u64,
    },
    /// A stream of its output is longer than `output_bytes` was.
    OutputOver {
        /// So many bytes were allowed then.
        allowed: u64,
    },
    /// The server's own pipe or disk failed.
    HostFailed,
    /// The server is stopping and cannot wait any longer.
    Draining,
}

/// All that is known of a job's end.
#[derive(Debug)]
pub(super) struct Evidence<'a> {
    pub(super) runtime: Runtime,
    pub(super) limits: &'a Limits,
    /// From the kernel, through the launcher.
    pub(super) end: &'a SandboxReport,
    /// From the process that ran the tenant's code.
    pub(super) report: Option<&'a Report>,
    /// From the server's own watchers.
    pub(super) stop: Option<Stop>,
    /// Bytes of the longer of the two output streams.
    pub(super) output_bytes: u64,
}

impl Evidence<'_> {
    /// The verdict. Limits that were broken come first, the kernel's word second, the sandbox's own last.
    pub(super) fn outcome(&self) -> Outcome {
        if let Some(Stop::OutputOver { allowed }) = self.stop {
            return over(Limit::OutputBytes, allowed, self.output_bytes);
        }
        if self.output_bytes > self.limits.get(Limit::OutputBytes) {
            return self.over(Limit::OutputBytes, self.output_bytes);
        }
        match self.end.killed {
            Some(KillCause::Memory) => {
                let peak = self.end.usage.memory_peak_bytes.unwrap_or(0);
                return self.over(Limit::MemoryBytes, peak.max(self.limits.get(Limit::MemoryBytes)));
            }
            Some(KillCause::WallTime) => return self.over(Limit::WallTimeMs, self.end.usage.wall_us / 1000),
            Some(KillCause::CpuTime) => {
                let usage = self.end.usage;
                let used = usage.cpu_user_us.unwrap_or(0) + usage.cpu_system_us.unwrap_or(0);
                return self.over(Limit::CpuTimeMs, used / 1000);
            }
            Some(KillCause::Requested) => return self.stopped(),
            Some(KillCause::Outside) => return Outcome::Lost,
            None => {}
        }
        if !self.end.started {
            // a report without a start is the workload's own refusal; anything else is the host's fault
            return match self.report {
                Some(Report::NotRunnable(reason)) => Outcome::NotRunnable { reason: reason.clone() },
                _ => Outcome::Lost,
            };
        }
        let own = match self.runtime {
            Runtime::Native => self.native(),
            Runtime::Wasm => self.wasm(),
        };
        match self.stop {
            // before it could be killed it failed of its own, most likely of a stream that nobody reads any more
            Some(Stop::Cancelled | Stop::InputBroken) if !own.is_success() => Outcome::Cancelled,
            _ => own,
        }
    }

    fn stopped(&self) -> Outcome {
        match self.stop {
            Some(Stop::Cancelled | Stop::InputBroken) => Outcome::Cancelled,
            Some(Stop::InputOver { reached, allowed }) => over(Limit::InputBytes, allowed, reached),
            // output that was too long is told above
            Some(Stop::OutputOver { .. } | Stop::HostFailed | Stop::Draining) | None => Outcome::Lost,
        }
    }

    fn native(&self) -> Outcome {
        match (self.report, self.end.exit) {
            (Some(Report::NotRunnable(reason)), _) => Outcome::NotRunnable { reason: reason.clone() },
            (_, Exit::Exited(exit_code)) => Outcome::Exited { exit_code },
            (_, Exit::Signaled(signal)) => Outcome::Signaled { signal },
        }
    }

    fn wasm(&self) -> Outcome {
        let Some(report) = self.report else {
            // the runtime died beneath the guest, or said what it never says: whichever, the guest is to blame, and
            // the sandbox around it held
            let backtrace = match self.end.exit {
                Exit::Signaled(signal) => format!("the runtime was ended by signal {signal}"),
                Exit::Exited(code) => format!("the runtime ended with code {code} and no report"),
            };
            return Outcome::Trapped { trap: "internal".into(), backtrace };
        };
        match report {
            Report::NotRunnable(reason) | Report::Invalid(reason) => Outcome::NotRunnable { reason: reason.clone() },
            Report::Compiled { .. } => Outcome::Trapped { trap: "internal".into(), backtrace: String::new() },
            Report::Wasm { end, .. } => match end {
                WasmEnd::Exited(exit_code) => Outcome::Exited { exit_code: *exit_code },
                WasmEnd::Trapped { code, backtrace } => {
                    Outcome::Trapped { trap: code.clone(), backtrace: backtrace.clone() }
                }
                WasmEnd::OutOfFuel => self.over(Limit::Fuel, self.limits.get(Limit::Fuel)),
                WasmEnd::OutOfMemory { asked } => self.over(Limit::MemoryBytes, *asked),
            },
        }
    }

    fn over(&self, limit: Limit, reached: u64) -> Outcome {
        over(limit, self.limits.get(limit), reached)
    }
}

fn over(limit: Limit, allowed: u64, reached: u64) -> Outcome {
    Outcome::OverLimit { limit: limit.key(), allowed: limit.to_json(allowed), reached: limit.to_json(reached) }
}

/// Fuel that the guest is said to have used. Never more than it had: the figure comes from a process that ran a
/// stranger's code.
pub(super) fn fuel_used(runtime: Runtime, limits: &Limits, report: Option<&Report>) -> Option<u64> {
    match (runtime, report) {
        (Runtime::Wasm, Some(Report::Wasm { fuel_used, .. })) => Some((*fuel_used).min(limits.get(Limit::Fuel))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use holm_sandbox::usage::Usage;
    use serde_json::json;

    use super::*;
    use crate::limit::{Given, Maximums};

    struct Case {
        runtime: Runtime,
        exit: Exit,
        killed: Option<KillCause>,
        started: bool,
        report: Option<Report>,
        stop: Option<Stop>,
        output_bytes: u64,
    }

    impl Case {
        fn native(exit: Exit) -> Self {
            Self {
                runtime: Runtime::Native,
                exit,
                killed: None,
                started: true,
                report: None,
                stop: None,
                output_bytes: 0,
            }
        }

        fn wasm(report: Option<Report>) -> Self {
            Self { runtime: Runtime::Wasm, report, ..Self::native(Exit::Exited(0)) }
        }

        fn outcome(&self) -> Value {
            let limits = Limits::resolve(self.runtime, &[&Given::default()], &Maximums::default());
            let usage = Usage { wall_us: 30_001_000, memory_peak_bytes: Some(5), ..Usage::default() };
            let (exit, killed, started) = (self.exit, self.killed, self.started);
            let end = SandboxReport { exit, killed, started, usage, tenant_io: None };
            let evidence = Evidence {
                runtime: self.runtime,
                limits: &limits,
                end: &end,
                report: self.report.as_ref(),
                stop: self.stop,
                output_bytes: self.output_bytes,
            };
            serde_json::to_value(evidence.outcome()).unwrap()
        }
    }

    #[test]
    fn exit_and_signal_are_the_kernel_s() {
        assert_eq!(Case::native(Exit::Exited(7)).outcome(), json!({"kind": "exited", "exit_code": 7}));
        assert_eq!(Case::native(Exit::Signaled(6)).outcome(), json!({"kind": "signaled", "signal": 6}));
        let failed = Report::NotRunnable("exec: format".into());
        let case = Case { report: Some(failed), ..Case::native(Exit::Exited(70)) };
        assert_eq!(case.outcome(), json!({"kind": "not_runnable", "reason": "exec: format"}));
    }

    #[test]
    fn a_native_job_cannot_report_a_verdict_of_its_own() {
        let forged = Report::Wasm { end: WasmEnd::Exited(0), fuel_used: 0 };
        let case = Case { report: Some(forged), ..Case::native(Exit::Exited(3)) };
        assert_eq!(case.outcome(), json!({"kind": "exited", "exit_code": 3}));
    }

    #[test]
    fn limits_name_their_key_and_both_figures() {
        let wall = Case { killed: Some(KillCause::WallTime), ..Case::native(Exit::Signaled(9)) };
        let expected = json!({"kind": "over_limit", "limit": "wall_time_ms", "allowed": 30_000, "reached": 30_001});
        assert_eq!(wall.outcome(), expected);
        let memory = Case { killed: Some(KillCause::Memory), ..Case::native(Exit::Signaled(9)) };
        let most = 128 << 20;
        let expected = json!({"kind": "over_limit", "limit": "memory_bytes", "allowed": most, "reached": most});
        assert_eq!(memory.outcome(), expected, "at least the limit was reached");
        let output = Case { output_bytes: (4 << 20) + 1, ..Case::native(Exit::Exited(0)) };
        assert_eq!(output.outcome()["limit"], "output_bytes", "also of a job that has ended well by then");
        let raised = Some(Stop::OutputOver { allowed: 7 });
        let outcome = Case { output_bytes: 9, stop: raised, ..Case::native(Exit::Signaled(9)) }.outcome();
        assert_eq!((&outcome["allowed"], &outcome["reached"]), (&json!(7), &json!(9)), "though it was raised since");
        let fuel = Case::wasm(Some(Report::Wasm { end: WasmEnd::OutOfFuel, fuel_used: 9 }));
        assert_eq!(fuel.outcome()["limit"], "fuel");
        let stop = Some(Stop::InputOver { reached: 17 << 20, allowed: 16 << 20 });
        let input = Case { killed: Some(KillCause::Requested), stop, ..Case::native(Exit::Signaled(9)) };
        assert_eq!(input.outcome()["limit"], "input_bytes");
    }

    #[test]
    fn a_wasm_runtime_that_died_is_a_trap_and_its_report_is_believed_last() {
        let died = Case { exit: Exit::Signaled(11), ..Case::wasm(None) };
        assert_eq!(died.outcome()["trap"], "internal");
        let good = Report::Wasm { end: WasmEnd::Exited(0), fuel_used: 1 };
        let killed = Case { killed: Some(KillCause::CpuTime), ..Case::wasm(Some(good)) };
        assert_eq!(killed.outcome()["limit"], "cpu_time_ms");
    }

    #[test]
    fn our_faults_are_lost_and_orders_are_cancelled() {
        assert_eq!(Case { started: false, ..Case::native(Exit::Exited(71)) }.outcome()["kind"], "lost");
        let outside = Case { killed: Some(KillCause::Outside), ..Case::native(Exit::Signaled(9)) };
        assert_eq!(outside.outcome()["kind"], "lost");
        for (stop, kind) in [(Stop::Cancelled, "cancelled"), (Stop::HostFailed, "lost"), (Stop::Draining, "lost")] {
            let killed = Some(KillCause::Requested);
            let case = Case { killed, stop: Some(stop), ..Case::native(Exit::Signaled(9)) };
            assert_eq!(case.outcome()["kind"], kind);
        }
    }

    #[test]
    fn what_fails_because_nobody_waits_for_it_is_cancelled() {
        let stop = Some(Stop::Cancelled);
        assert_eq!(Case { stop, ..Case::native(Exit::Signaled(13)) }.outcome()["kind"], "cancelled");
        let trapped = Report::Wasm {
            end: WasmEnd::Trapped { code: "unreachable_code_reached".into(), backtrace: String::new() },
            fuel_used: 1,
        };
        assert_eq!(Case { stop, ..Case::wasm(Some(trapped)) }.outcome()["kind"], "cancelled");
        assert_eq!(Case { stop, ..Case::native(Exit::Exited(0)) }.outcome()["kind"], "exited", "it was done by then");
    }

    #[test]
    fn fuel_is_never_more_than_there_was() {
        let limits = Limits::resolve(Runtime::Wasm, &[], &Maximums::default());
        let report = |fuel_used| Some(Report::Wasm { end: WasmEnd::Exited(0), fuel_used });
        assert_eq!(fuel_used(Runtime::Wasm, &limits, report(5).as_ref()), Some(5));
        assert_eq!(fuel_used(Runtime::Wasm, &limits, report(u64::MAX).as_ref()), Some(10_000_000_000));
        assert_eq!(fuel_used(Runtime::Native, &limits, report(5).as_ref()), None);
        assert_eq!(fuel_used(Runtime::Wasm, &limits, None), None);
    }
}
