//! `ETag`, `If-Match` and `If-None-Match` on configuration (RFC 9110, section 13), and JSON Merge Patch (RFC 7396).

use axum::http::{HeaderMap, HeaderValue, header};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::problem::{Code, Problem};

/// The strong validator of a resource.
pub(super) fn etag(content: &impl Serialize) -> String {
    let json = serde_json::to_vec(content).unwrap_or_default();
    format!("\"{}\"", hex::encode(&Sha256::digest(&json)[..16]))
}

/// A validator as a header's value.
pub(super) fn etag_header(tag: &str) -> HeaderValue {
    HeaderValue::from_str(tag).unwrap_or_else(|_| unreachable!("a quoted hexadecimal number"))
}

/// What a request says of the state that it is meant for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Conditions {
    if_match: Option<Tags>,
    if_none_match: Option<Tags>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Tags {
    Any,
    Listed(Vec<String>),
}

impl Conditions {
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        Ok(Self {
            if_match: Tags::of(headers, &header::IF_MATCH)?,
            if_none_match: Tags::of(headers, &header::IF_NONE_MATCH)?,
        })
    }

    /// Whether they hold for a resource with this validator; `None` if there is no resource.
    pub(super) fn hold(&self, now: Option<&str>) -> bool {
        let matches = |tags: &Tags| match (tags, now) {
            (_, None) => false,
            (Tags::Any, Some(_)) => true,
            (Tags::Listed(tags), Some(now)) => tags.iter().any(|tag| tag == now),
        };
        self.if_match.as_ref().is_none_or(matches) && !self.if_none_match.as_ref().is_some_and(matches)
    }
}

impl Tags {
    fn of(headers: &HeaderMap, name: &header::HeaderName) -> Result<Option<Self>, Problem> {
        let mut tags = Vec::new();
        for value in headers.get_all(name) {
            let text = value.to_str().map_err(|_| Problem::malformed(format!("`{name}` is not ASCII")))?;
            if text.trim() == "*" {
                return Ok(Some(Self::Any));
            }
            tags.extend(text.split(',').map(|tag| tag.trim().to_owned()));
        }
        Ok((!tags.is_empty()).then_some(Self::Listed(tags)))
    }
}

/// How often a patch is laid over what somebody else has changed in the same moment.
const PATCH_TRIES: usize = 10;

/// Whether a patch that came to nothing is to be tried again on what is there now.
#[derive(Debug)]
pub(super) struct Tries(usize);

impl Tries {
    /// A request that is for one state alone is tried once.
    pub(super) fn of(conditions: &Conditions) -> Self {
        let unconditional = conditions.if_match.is_none() && conditions.if_none_match.is_none();
        Self(if unconditional { PATCH_TRIES } else { 1 })
    }

    /// Counts a try with this result.
    pub(super) fn go_on<T>(&mut self, result: &Result<T, Problem>) -> bool {
        self.0 -= 1;
        self.0 > 0 && result.as_ref().is_err_and(|problem| problem.is(Code::PreconditionFailed))
    }
}

/// Lays `patch` over `target`: members replace members, `null` takes them away.
pub(super) fn merge_patch(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Value::Object(target) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(&key);
        } else {
            merge_patch(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// JSON of some depth.
    fn value() -> impl Strategy<Value = Value> {
        let leaf =
            prop_oneof![Just(Value::Null), any::<bool>().prop_map(Value::from), any::<i64>().prop_map(Value::from)];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                prop::collection::btree_map("[a-c]", inner, 0..4).prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_header_is_read_or_refused_and_never_both_wanted_and_unwanted(
            value in "[\\x20-\\x7e]{0,40}", tag in "\"[a-f]{0,4}\"",
        ) {
            let (wanted, unwanted) = (conditions("if-match", &value), conditions("if-none-match", &value));
            prop_assert_ne!(wanted.hold(Some(&tag)), unwanted.hold(Some(&tag)));
            prop_assert!(!wanted.hold(None) && unwanted.hold(None));
            let listed = conditions("if-match", &format!("\"x\",{tag} , \"y\""));
            prop_assert!(listed.hold(Some(&tag)));
        }

        #[test]
        fn a_patch_laid_over_twice_is_laid_over_once(target in value(), patch in value()) {
            let mut once = target;
            merge_patch(&mut once, patch.clone());
            let mut twice = once.clone();
            merge_patch(&mut twice, patch);
            prop_assert_eq!(twice, once);
        }
    }

    fn conditions(name: &'static str, value: &str) -> Conditions {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        Conditions::of(&headers).unwrap()
    }

    #[test]
    fn conditions_are_those_of_the_rfc() {
        assert!(Conditions::of(&HeaderMap::new()).unwrap().hold(None));
        assert!(conditions("if-none-match", "*").hold(None));
        assert!(!conditions("if-none-match", "*").hold(Some("\"a\"")));
        assert!(conditions("if-match", "\"b\", \"a\"").hold(Some("\"a\"")));
        assert!(!conditions("if-match", "\"b\"").hold(Some("\"a\"")));
        assert!(!conditions("if-match", "W/\"a\"").hold(Some("\"a\"")), "a weak tag is no strong match");
        assert!(!conditions("if-match", "*").hold(None));
    }

    #[test]
    fn merge_patch_is_that_of_the_rfc() {
        // RFC 7396, appendix A
        for (target, patch, result) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
            (json!({"a": "foo"}), json!("bar"), json!("bar")),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
            (json!([1, 2]), json!({"a": "b", "c": null}), json!({"a": "b"})),
            (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ] {
            let mut merged = target;
            merge_patch(&mut merged, patch);
            assert_eq!(merged, result);
        }
    }
}
