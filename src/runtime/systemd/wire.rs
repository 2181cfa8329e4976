//! D-Bus messages as bytes (D-Bus Specification, "Message Protocol"), as far as a caller of systemd needs them: calls are
//! written, replies and signals are read. Little endian, which is what every peer on this machine sends.

use std::io::{self, ErrorKind, Read};

/// No answer of systemd's is longer, in bytes.
const LONGEST: u32 = 1 << 20;

/// One kind of message: the second byte of its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Call = 1,
    Return = 2,
    Error = 3,
    Signal = 4,
}

// Fields of a header.
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SENDER: u8 = 7;
const SIGNATURE: u8 = 8;
const UNIX_FDS: u8 = 9;

/// What a property of a unit can be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    Bool(bool),
    Int(i32),
    Uint(u32),
    Long(i64),
    Ulong(u64),
    Text(String),
    Texts(Vec<String>),
    Bytes(Vec<u8>),
    Uints(Vec<u32>),
    Pairs(Vec<(String, String)>),
}

impl Value {
    fn signature(&self) -> &'static str {
        match self {
            Value::Bool(_) => "b",
            Value::Int(_) => "i",
            Value::Uint(_) => "u",
            Value::Long(_) => "x",
            Value::Ulong(_) => "t",
            Value::Text(_) => "s",
            Value::Texts(_) => "as",
            Value::Bytes(_) => "ay",
            Value::Uints(_) => "au",
            Value::Pairs(_) => "a(ss)",
        }
    }
}

/// Name and value.
pub type Property = (String, Value);

/// Values one after another, each aligned as the specification wants it.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    pub fn byte(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub fn uint(&mut self, value: u32) {
        self.align(4);
        self.bytes.extend(value.to_le_bytes());
    }

    pub fn bool(&mut self, value: bool) {
        self.uint(u32::from(value));
    }

    fn ulong(&mut self, value: u64) {
        self.align(8);
        self.bytes.extend(value.to_le_bytes());
    }

    pub fn text(&mut self, value: &str) {
        self.uint(value.len() as u32);
        self.bytes.extend(value.as_bytes());
        self.bytes.push(0);
    }

    fn signature(&mut self, value: &str) {
        self.bytes.push(value.len() as u8);
        self.bytes.extend(value.as_bytes());
        self.bytes.push(0);
    }

    /// `alignment` is that of an element, which counts even where there is none.
    pub fn array<T>(&mut self, alignment: usize, elements: &[T], mut write: impl FnMut(&mut Writer, &T)) {
        self.uint(0);
        let length_at = self.bytes.len() - 4;
        self.align(alignment);
        let start = self.bytes.len();
        for element in elements {
            write(self, element);
        }
        let length = (self.bytes.len() - start) as u32;
        self.bytes[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    }

    fn variant(&mut self, value: &Value) {
        self.signature(value.signature());
        match value {
            Value::Bool(value) => self.bool(*value),
            Value::Int(value) => self.uint(value.cast_unsigned()),
            Value::Uint(value) => self.uint(*value),
            Value::Long(value) => self.ulong(value.cast_unsigned()),
            Value::Ulong(value) => self.ulong(*value),
            Value::Text(value) => self.text(value),
            Value::Texts(values) => self.array(4, values, |w, value| w.text(value)),
            Value::Bytes(values) => self.array(1, values, |w, value| w.byte(*value)),
            Value::Uints(values) => self.array(4, values, |w, value| w.uint(*value)),
            Value::Pairs(pairs) => self.array(8, pairs, |w, (first, second)| {
                w.align(8);
                w.text(first);
                w.text(second);
            }),
        }
    }

    /// `a(sv)`
    pub fn properties(&mut self, properties: &[Property]) {
        self.array(8, properties, |w, (name, value)| {
            w.align(8);
            w.text(name);
            w.variant(value);
        });
    }
}

/// Whom a call is for.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    pub destination: &'a str,
    pub path: &'a str,
    pub interface: &'a str,
}

/// The bytes of a method call whose arguments are `body`, of type `signature`.
pub fn call(serial: u32, target: Target<'_>, member: &str, signature: &str, body: Writer) -> Vec<u8> {
    let mut message = Writer::default();
    message.bytes.extend([b'l', Kind::Call as u8, 0, 1]);
    message.uint(body.bytes.len() as u32);
    message.uint(serial);
    let mut fields = vec![
        (PATH, "o", target.path),
        (DESTINATION, "s", target.destination),
        (INTERFACE, "s", target.interface),
        (MEMBER, "s", member),
    ];
    if !signature.is_empty() {
        fields.push((SIGNATURE, "g", signature));
    }
    message.array(8, &fields, |w, (code, kind, value)| {
        w.align(8);
        w.byte(*code);
        w.signature(kind);
        if *kind == "g" { w.signature(value) } else { w.text(value) }
    });
    message.align(8);
    message.bytes.extend(body.bytes);
    message.bytes
}

/// What a peer of ours would send.
#[cfg(test)]
pub fn answer(kind: Kind, reply_to: u32, name: &str, signature: &str, body: Writer) -> Vec<u8> {
    let mut message = Writer::default();
    message.bytes.extend([b'l', kind as u8, 0, 1]);
    message.uint(body.bytes.len() as u32);
    message.uint(77);
    let named = if kind == Kind::Error { ERROR_NAME } else { MEMBER };
    let mut fields = vec![(named, "s"), (SIGNATURE, "g")];
    if kind != Kind::Signal {
        fields.push((REPLY_SERIAL, "u"));
    }
    message.array(8, &fields, |w, (code, kind)| {
        w.align(8);
        w.byte(*code);
        w.signature(kind);
        match *kind {
            "g" => w.signature(signature),
            "u" => w.uint(reply_to),
            _ => w.text(name),
        }
    });
    message.align(8);
    message.bytes.extend(body.bytes);
    message.bytes
}

/// A message that has come.
#[derive(Debug, PartialEq, Eq)]
pub struct Message {
    pub kind: Kind,
    pub member: String,
    pub error: String,
    pub reply_to: u32,
    pub signature: String,
    #[cfg(test)]
    serial: u32,
    body: Vec<u8>,
}

impl Message {
    /// The next message of a stream.
    ///
    /// # Errors
    /// What is no message, or longer than systemd's are.
    pub fn read(from: &mut impl Read) -> io::Result<Message> {
        let mut fixed = [0; 16];
        from.read_exact(&mut fixed)?;
        let kind = match fixed[1] {
            1 => Kind::Call,
            2 => Kind::Return,
            3 => Kind::Error,
            4 => Kind::Signal,
            _ => return Err(bad("its kind")),
        };
        if fixed[0] != b'l' || fixed[3] != 1 {
            return Err(bad("its byte order or version"));
        }
        let word = |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        let (body, fields) = (word(4), word(12));
        if body > LONGEST || fields > LONGEST {
            return Err(bad("its length"));
        }
        // The header ends on a multiple of eight.
        let mut header = vec![0; (fields as usize).next_multiple_of(8)];
        from.read_exact(&mut header)?;
        header.truncate(fields as usize);
        let mut message = Message {
            kind,
            member: String::new(),
            error: String::new(),
            reply_to: 0,
            signature: String::new(),
            #[cfg(test)]
            serial: word(8),
            body: vec![0; body as usize],
        };
        from.read_exact(&mut message.body)?;
        let mut reader = Reader { bytes: &header, at: 0 };
        while reader.at < header.len() {
            reader.align(8);
            message.field(&mut reader)?;
        }
        Ok(message)
    }

    fn field(&mut self, reader: &mut Reader<'_>) -> io::Result<()> {
        let (code, signature) = (reader.byte()?, reader.signature()?);
        match (code, signature.as_str()) {
            (MEMBER, "s") => self.member = reader.text()?,
            (ERROR_NAME, "s") => self.error = reader.text()?,
            (REPLY_SERIAL, "u") => self.reply_to = reader.uint()?,
            (SIGNATURE, "g") => self.signature = reader.signature()?,
            (PATH, "o") | (INTERFACE | DESTINATION | SENDER, "s") => drop(reader.text()?),
            (UNIX_FDS, "u") => drop(reader.uint()?),
            _ => return Err(bad("a field of its header")),
        }
        Ok(())
    }

    #[cfg(test)]
    pub fn serial(&self) -> u32 {
        self.serial
    }

    pub fn body(&self) -> Reader<'_> {
        Reader { bytes: &self.body, at: 0 }
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("D-Bus message: {what} is not as it must be"))
}

#[cfg(test)]
impl Reader<'_> {
    /// All that has not been read.
    pub fn rest(&self) -> &[u8] {
        &self.bytes[self.at..]
    }
}

#[cfg(test)]
impl Writer {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Values read one after another.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, length: usize) -> io::Result<&[u8]> {
        let end = self.at.checked_add(length);
        let taken = end.and_then(|end| self.bytes.get(self.at..end)).ok_or_else(|| bad("its end"))?;
        self.at += length;
        Ok(taken)
    }

    fn byte(&mut self) -> io::Result<u8> {
        Ok(self.take(1)?[0])
    }

    pub fn uint(&mut self) -> io::Result<u32> {
        self.align(4);
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// A string or an object path.
    pub fn text(&mut self) -> io::Result<String> {
        let length = self.uint()? as usize;
        self.terminated(length)
    }

    fn signature(&mut self) -> io::Result<String> {
        let length = usize::from(self.byte()?);
        self.terminated(length)
    }

    fn terminated(&mut self, length: usize) -> io::Result<String> {
        let bytes = self.take(length)?.to_vec();
        match self.byte()? {
            0 => String::from_utf8(bytes).map_err(|_| bad("a text")),
            _ => Err(bad("a text's end")),
        }
    }

    /// A variant that holds a string.
    pub fn text_variant(&mut self) -> io::Result<String> {
        match self.signature()?.as_str() {
            "s" => self.text(),
            _ => Err(bad("a variant's type")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: Target<'_> = Target { destination: "a.b", path: "/a", interface: "a.b.C" };

    #[test]
    fn what_is_written_can_be_read() {
        let mut body = Writer::default();
        body.uint(7);
        body.text("/job/7");
        body.text("x.scope");
        let bytes = call(3, TARGET, "JobRemoved", "uos", body);
        let message = Message::read(&mut bytes.as_slice()).unwrap();
        assert_eq!(
            (message.kind, message.member.as_str(), message.signature.as_str()),
            (Kind::Call, "JobRemoved", "uos")
        );
        let mut body = message.body();
        assert_eq!(body.uint().unwrap(), 7);
        assert_eq!((body.text().unwrap(), body.text().unwrap()), ("/job/7".into(), "x.scope".into()));
        assert!(body.uint().is_err());
    }

    #[test]
    fn values_are_aligned() {
        let mut writer = Writer::default();
        writer.byte(1);
        writer.properties(&[("A".into(), Value::Ulong(5)), ("B".into(), Value::Uints(vec![9]))]);
        // The first property: name, signature of one letter, and eight bytes on a multiple of eight.
        assert_eq!(writer.bytes[8..16], *b"\x01\0\0\0A\0\x01t");
        assert_eq!(writer.bytes[24..32], 5_u64.to_le_bytes());
        // The second begins on one, too; its array counts its elements' bytes.
        assert_eq!(writer.bytes[32..42], *b"\x01\0\0\0B\0\x02au\0");
        assert_eq!(writer.bytes[44..], *b"\x04\0\0\0\x09\0\0\0");
        assert_eq!(writer.bytes[4..8], 44_u32.to_le_bytes());
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let good = call(3, TARGET, "M", "", Writer::default());
        assert!(Message::read(&mut good.as_slice()).is_ok());
        for at in 0..good.len() {
            let _ = Message::read(&mut &good[..at]).unwrap_err();
            let mut broken = good.clone();
            broken[at] ^= 0xff;
            let _ = Message::read(&mut broken.as_slice());
        }
        let mut long = good;
        long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Message::read(&mut long.as_slice()).unwrap_err().to_string().contains("length"));
    }
}
