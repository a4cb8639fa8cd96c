//! Schemas that are made from tables: limits, quotas, problem codes.

use holm_sandbox::ceiling::Ceiling;
use utoipa::openapi::schema::{
    AdditionalProperties, ArrayBuilder, Components, ObjectBuilder, Schema, SchemaType, Type,
};
use utoipa::openapi::{Ref, RefOr};

use crate::limit::{Limit, Runtime};
use crate::server::problem::Code;
use crate::tenant::{CeilingSettings, QuotaKey};

/// Adds them to the document.
pub(super) fn add_to(components: &mut Components) {
    components.schemas.insert("JobLimits".into(), job_limits());
    components.schemas.insert("TenantLimits".into(), tenant_limits());
    components.schemas.insert("Quota".into(), quota());
    components.schemas.insert("ProblemCode".into(), codes());
    components.schemas.insert("Problem".into(), problem());
}

#[allow(clippy::cast_precision_loss)] // every bound is below 2^53
fn job_limits() -> RefOr<Schema> {
    let mut object = ObjectBuilder::new()
        .description(Some("Limits of a job. Zero, negative and absent never mean unlimited."))
        .additional_properties(Some(AdditionalProperties::FreeForm(false)));
    for limit in Limit::ALL {
        let scale = if limit == Limit::CpuCores { 1000.0 } else { 1.0 };
        let kind = if limit == Limit::CpuCores { Type::Number } else { Type::Integer };
        let runtime = if limit.applies_to(Runtime::Native) { Runtime::Native } else { Runtime::Wasm };
        let property = ObjectBuilder::new()
            .schema_type(SchemaType::Type(kind))
            .description(Some(limit.about()))
            .minimum(Some(limit.minimum(None) as f64 / scale))
            .maximum(Some(limit.maximum() as f64 / scale))
            .default(Some(limit.to_json(limit.default(runtime))));
        object = object.property(limit.key(), property);
    }
    object.into()
}

fn tenant_limits() -> RefOr<Schema> {
    let about = "The ceiling over all of a tenant's jobs together. What is not set leaves the tenant the server's own \
                 share; no device but the standard six and no huge page is had that is not listed. What this machine \
                 cannot enforce is refused.";
    let mut object = ObjectBuilder::new()
        .description(Some(about))
        .additional_properties(Some(AdditionalProperties::FreeForm(false)));
    for (name, minimum, maximum, about) in CeilingSettings::NUMBERS {
        let kind = if *name == "cpu_cores" { Type::Number } else { Type::Integer };
        let property = ObjectBuilder::new()
            .schema_type(SchemaType::Type(kind))
            .description(Some(*about))
            .minimum(Some(*minimum))
            .maximum(Some(*maximum));
        object = object.property(*name, property);
    }
    for (name, about) in CeilingSettings::OTHERS {
        let property: RefOr<Schema> = match *name {
            "cpuset" => {
                ObjectBuilder::new().schema_type(SchemaType::Type(Type::String)).description(Some(*about)).into()
            }
            "hugetlb" => ObjectBuilder::new()
                .additional_properties(Some(ObjectBuilder::new().schema_type(SchemaType::Type(Type::Integer))))
                .description(Some(*about))
                .into(),
            name => list_of_devices(name == "io", about),
        };
        object = object.property(*name, property);
    }
    object.into()
}

fn list_of_devices(with_rates: bool, about: &str) -> RefOr<Schema> {
    let text = || ObjectBuilder::new().schema_type(SchemaType::Type(Type::String));
    let rate = || ObjectBuilder::new().schema_type(SchemaType::Type(Type::Integer)).minimum(Some(1.0));
    let mut entry = ObjectBuilder::new()
        .property("device", text().pattern(Some("^[0-9]+:[0-9]+$")))
        .required("device")
        .additional_properties(Some(AdditionalProperties::FreeForm(false)));
    if with_rates {
        for name in ["read_bps", "write_bps", "read_iops", "write_iops"] {
            entry = entry.property(name, rate());
        }
    } else {
        entry = entry
            .property("type", text().enum_values(Some(["block", "char"])))
            .property("access", text().enum_values(Some(["r", "w", "rw"])))
            .required("type")
            .required("access");
    }
    ArrayBuilder::new().items(entry).max_items(Some(Ceiling::MOST_DEVICES)).description(Some(about)).into()
}

#[allow(clippy::cast_precision_loss)] // every bound is below 2^53
fn quota() -> RefOr<Schema> {
    let mut object = ObjectBuilder::new()
        .description(Some("What a tenant may have at once and in all."))
        .additional_properties(Some(AdditionalProperties::FreeForm(false)));
    for key in QuotaKey::ALL {
        let (minimum, default, maximum) = key.range();
        let property = ObjectBuilder::new()
            .schema_type(SchemaType::Type(Type::Integer))
            .description(Some(key.about()))
            .minimum(Some(minimum as f64))
            .maximum(Some(maximum as f64))
            .default(Some(default.into()));
        object = object.property(key.word(), property);
    }
    object.into()
}

fn codes() -> RefOr<Schema> {
    let lines: Vec<String> = Code::ALL
        .iter()
        .map(|code| format!("- `{}` ({}): {}", code.word(), code.status().as_u16(), code.title()))
        .collect();
    ObjectBuilder::new()
        .schema_type(SchemaType::Type(Type::String))
        .description(Some(lines.join("\n")))
        .enum_values(Some(Code::ALL.iter().map(|code| code.word())))
        .into()
}

fn problem() -> RefOr<Schema> {
    let text = || ObjectBuilder::new().schema_type(SchemaType::Type(Type::String));
    ObjectBuilder::new()
        .description(Some("An error (RFC 9457). Some have further members that say more."))
        .property("type", text())
        .property("title", text())
        .property("status", ObjectBuilder::new().schema_type(SchemaType::Type(Type::Integer)))
        .property("detail", text())
        .property("code", Ref::from_schema_name("ProblemCode"))
        .required("type")
        .required("title")
        .required("status")
        .required("code")
        .into()
}
