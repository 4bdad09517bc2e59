// SPDX-License-Identifier: Apache-2.0 OR MIT

//! JSON-RPC: from a line to a call and from its outcome to a line. What a client sends can be anything at all.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use vssd_protocol::control::{ErrorCode, MAX_LINE, SubscribeParams};

use crate::fault::Fault;

/// An id is sent back as it came; a client that needs a longer one does not need an id.
const MAX_ID_LEN: usize = 256;
const MAX_FILTERS: usize = 32;

/// Which socket a client came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    Control,
    /// Reads and events only.
    Monitor,
}

impl Door {
    /// Longest line, newline included. Anybody may come through the monitor socket, and many at a time: what is kept
    /// of each is small, and so is everything there is to ask.
    pub fn max_line(self) -> usize {
        match self {
            Self::Control => MAX_LINE,
            Self::Monitor => MAX_LINE / 16,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Monitor => "monitor",
        }
    }
}

/// A request that is well-formed as JSON-RPC.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    pub id: Value,
    pub method: String,
    pub params: Map<String, Value>,
}

/// Reads a line (without its newline). An error carries the id that its answer is to have.
pub fn parse(line: &[u8]) -> Result<Call, (Value, Fault)> {
    let invalid = |id: &Value, message: &str| (id.clone(), Fault::new(ErrorCode::InvalidRequest, message));
    let value: Value = serde_json::from_slice(line).map_err(|error| {
        (Value::Null, Fault::new(ErrorCode::Parse, format!("the line is no JSON: {error}")))
    })?;
    let none = Value::Null;
    let mut object = match value {
        Value::Object(object) => object,
        Value::Array(_) => return Err(invalid(&none, "batches are not served: send one request a line")),
        _ => return Err(invalid(&none, "a request is a JSON object")),
    };
    let id = match object.remove("id") {
        Some(id @ Value::Number(_)) => id,
        Some(Value::String(id)) if id.len() <= MAX_ID_LEN => Value::String(id),
        Some(Value::String(_)) => return Err(invalid(&none, "the id is too long")),
        Some(Value::Null) | None => {
            return Err(invalid(&none, "a request needs an id: every method has an answer"));
        }
        Some(_) => return Err(invalid(&none, "an id is a number or a string")),
    };
    if object.remove("jsonrpc").as_ref().and_then(Value::as_str) != Some("2.0") {
        return Err(invalid(&id, "field jsonrpc must be \"2.0\""));
    }
    let Some(Value::String(method)) = object.remove("method") else {
        return Err(invalid(&id, "field method must be a string"));
    };
    let params = match object.remove("params") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(params)) => params,
        Some(_) => {
            let fault = Fault::new(ErrorCode::InvalidParams, "params must be an object with named fields");
            return Err((id, fault));
        }
    };
    if let Some(field) = object.keys().next() {
        return Err(invalid(&id, &format!("unknown field {:?} in the request", shorten(field))));
    }
    Ok(Call { id, method, params })
}

/// The parameters of a call as a `T`, which denies unknown fields: a typing error must not silently do something else.
pub fn read<T: DeserializeOwned>(params: Map<String, Value>) -> Result<T, Fault> {
    serde_json::from_value(Value::Object(params))
        .map_err(|error| Fault::new(ErrorCode::InvalidParams, shorten(&error.to_string())))
}

/// The parameters of a call that has none.
pub fn nothing(params: Map<String, Value>) -> Result<(), Fault> {
    match params.into_iter().next() {
        None => Ok(()),
        Some((field, _)) => {
            let message = format!("unknown field {:?}: this method takes no parameters", shorten(&field));
            Err(Fault::new(ErrorCode::InvalidParams, message))
        }
    }
}

/// The parameters of `events.subscribe`.
pub fn subscription(params: Map<String, Value>) -> Result<SubscribeParams, Fault> {
    let params: SubscribeParams = read(params)?;
    if params.filter.len() > MAX_FILTERS {
        let message = format!("{} filters, at most {MAX_FILTERS} are allowed", params.filter.len());
        return Err(Fault::new(ErrorCode::TooLarge, message));
    }
    Ok(params)
}

pub fn unknown_method(method: &str) -> Fault {
    Fault::new(ErrorCode::UnknownMethod, format!("there is no method {:?}", shorten(method)))
}

/// A method that changes something was called where only reads are served.
pub fn not_on_monitor(method: &str) -> Fault {
    Fault::new(ErrorCode::Permission, format!("{method} is not served on the monitor socket"))
        .hint("use the control socket")
}

/// The answer of a call that was carried out, with its newline. `hint` says what to do about one that fits no line.
pub fn success<T: Serialize>(id: &Value, result: &T, hint: &str) -> String {
    let line = format!("{}\n", json!({ "jsonrpc": "2.0", "id": id, "result": result }));
    if line.len() <= MAX_LINE {
        return line;
    }
    let message = format!("the answer has {} bytes, a line has at most {MAX_LINE}", line.len());
    failure(id, Fault::new(ErrorCode::TooLarge, message).hint(hint))
}

/// The answer of a call that failed, with its newline.
pub fn failure(id: &Value, fault: Fault) -> String {
    format!("{}\n", json!({ "jsonrpc": "2.0", "id": id, "error": fault.into_rpc() }))
}

/// Refuses a request for a reason of the connection's own.
pub fn refusal(id: &Value, code: ErrorCode, message: &str) -> String {
    failure(id, Fault::new(code, message))
}

/// An error that answers no particular request.
pub fn complaint(code: ErrorCode, message: &str) -> String {
    failure(&Value::Null, Fault::new(code, message))
}

/// What is said before a client is disconnected whose line does not end.
pub fn line_too_long(door: Door) -> String {
    complaint(ErrorCode::TooLarge, &format!("a line has at most {} bytes", door.max_line()))
}

/// What a client is told that is one too many.
pub fn too_many_clients(most: usize) -> String {
    complaint(ErrorCode::TooLarge, &format!("{most} clients are connected, which is the limit"))
}

/// What a client sent, short enough for an answer or a log.
pub fn shorten(text: &str) -> String {
    const MOST: usize = 200;
    if text.chars().count() <= MOST {
        return text.to_owned();
    }
    text.chars().take(MOST).chain("…".chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(line: &str) -> (Value, ErrorCode, String) {
        let (id, fault) = parse(line.as_bytes()).unwrap_err();
        (id, fault.code, fault.message)
    }

    #[test]
    fn request_is_read_whole() {
        let call = parse(br#" {"jsonrpc":"2.0","id":"a","method":"lamp.on","params":{"lamp":1}} "#).unwrap();
        assert_eq!((call.id, call.method.as_str(), &call.params["lamp"]), (json!("a"), "lamp.on", &json!(1)));
        let call = parse(br#"{"jsonrpc":"2.0","id":-1.5,"method":"x","params":null}"#).unwrap();
        assert_eq!((call.id, call.params.len()), (json!(-1.5), 0));
    }

    #[test]
    fn what_is_no_request_is_refused_with_its_id_where_it_has_one() {
        use ErrorCode::{InvalidParams, InvalidRequest, Parse};
        for (line, id, code, word) in [
            ("", Value::Null, Parse, "no JSON"),
            ("{\"", Value::Null, Parse, "no JSON"),
            ("[]", Value::Null, InvalidRequest, "batches"),
            ("7", Value::Null, InvalidRequest, "object"),
            (r#"{"jsonrpc":"2.0","method":"m"}"#, Value::Null, InvalidRequest, "needs an id"),
            (r#"{"jsonrpc":"2.0","id":[1],"method":"m"}"#, Value::Null, InvalidRequest, "number or a string"),
            (r#"{"jsonrpc":"1.0","id":1,"method":"m"}"#, json!(1), InvalidRequest, "jsonrpc"),
            (r#"{"jsonrpc":"2.0","id":1,"method":2}"#, json!(1), InvalidRequest, "method"),
            (r#"{"jsonrpc":"2.0","id":1,"method":"m","params":[1]}"#, json!(1), InvalidParams, "params"),
            (r#"{"jsonrpc":"2.0","id":1,"method":"m","x":1}"#, json!(1), InvalidRequest, "\"x\""),
        ] {
            let refused = refused(line);
            assert_eq!((&refused.0, refused.1), (&id, code), "{line}");
            assert!(refused.2.contains(word), "{line}: {}", refused.2);
        }
        assert_eq!(parse(b"\xff{}").unwrap_err().1.code, Parse);
    }

    #[test]
    fn id_has_a_greatest_length() {
        let line = |len: usize| format!(r#"{{"jsonrpc":"2.0","id":"{}","method":"m"}}"#, "i".repeat(len));
        assert!(parse(line(MAX_ID_LEN).as_bytes()).is_ok());
        assert_eq!(refused(&line(MAX_ID_LEN + 1)).1, ErrorCode::InvalidRequest);
    }

    #[test]
    fn unknown_parameters_are_named_and_shortened() {
        let params = |field: &str| [(field.to_owned(), Value::Null)].into_iter().collect::<Map<_, _>>();
        assert!(read::<SubscribeParams>(params("colour")).unwrap_err().message.contains("`colour`"));
        assert!(nothing(params("colour")).unwrap_err().message.contains("\"colour\""));
        assert!(nothing(params(&"é".repeat(999))).unwrap_err().message.len() < 600);
        assert!(nothing(Map::new()).is_ok());
    }

    #[test]
    fn answer_that_fits_no_line_is_an_error_with_the_hint() {
        let short = success(&json!(1), &"x", "ask for less");
        assert_eq!(short, "{\"id\":1,\"jsonrpc\":\"2.0\",\"result\":\"x\"}\n");
        let long: Value =
            serde_json::from_str(&success(&json!(1), &"x".repeat(MAX_LINE), "ask for less")).unwrap();
        assert_eq!(long["error"]["data"], json!({ "code": "E_TOO_LARGE", "hint": "ask for less" }));
    }
}
