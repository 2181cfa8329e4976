//! The receiving half.

use std::io::{self, BufReader, Read};

use super::message::{Image, Message, raw};
use super::pages::{HEAD, Pages};
use super::{Control, Error, HEADER, MAX_CONTROL, MAX_NAME, MAX_PAYLOAD, Result};

/// Buffers that are kept for payloads to come.
const SPARE: usize = 8;

/// Receives messages; trusts no length before it was compared with what may be.
pub struct Reader<R: Read> {
    from: BufReader<R>,
    spare: Vec<Vec<u8>>,
    received: u64,
}

impl<R: Read> Reader<R> {
    pub fn new(from: R) -> Self {
        Reader { from: BufReader::with_capacity(256 << 10, from), spare: Vec::new(), received: 0 }
    }

    /// Bytes so far.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// The next message. That the other end is alive is no news: it is passed over.
    ///
    /// # Errors
    /// [`Error::Closed`] at the end of the stream, if that is where a message ends; [`Error::Silent`] if reading takes too long.
    pub fn recv(&mut self) -> Result<Message> {
        loop {
            match self.next()? {
                Message::Keepalive(_) => {}
                message => return Ok(message),
            }
        }
    }

    /// The next message, which must be of this type.
    pub fn expect<M: Control>(&mut self) -> Result<M> {
        self.recv()?.expect()
    }

    /// Takes back the bytes of a message that is done with, so that the next one need not ask the kernel for memory.
    pub fn recycle(&mut self, payload: Vec<u8>) {
        if self.spare.len() < SPARE {
            self.spare.push(payload);
        }
    }

    fn next(&mut self) -> Result<Message> {
        let header = self.header()?;
        let kind = u16::from_le_bytes([header[0], header[1]]);
        let flags = u16::from_le_bytes([header[2], header[3]]);
        let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
        if flags != 0 {
            return Err(Error::UnknownFlags { kind, flags });
        }
        self.received += (HEADER + length) as u64;
        match kind {
            raw::PAGES => self.pages(length),
            raw::IMAGE => self.image(length),
            raw::DISK => self.payload("Disk", length).map(Message::Disk),
            raw::ENGINE => self.payload("Engine", length).map(Message::Engine),
            raw::NETWORK => self.payload("Network", length).map(Message::Network),
            kind => {
                let decode = Message::decoder(kind).ok_or(Error::UnknownType(kind))?;
                let bytes = self.bytes("a control message", length, MAX_CONTROL)?;
                let message = decode(&bytes);
                self.recycle(bytes);
                message
            }
        }
    }

    /// The next frame's, or [`Error::Closed`] if there is none.
    fn header(&mut self) -> Result<[u8; HEADER]> {
        let mut header = [0; HEADER];
        let first = loop {
            match self.from.read(&mut header) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                first => break first.map_err(Error::read)?,
            }
        };
        if first == 0 {
            return Err(Error::Closed);
        }
        self.from.read_exact(&mut header[first..]).map_err(Error::read)?;
        Ok(header)
    }

    fn pages(&mut self, length: usize) -> Result<Message> {
        let Some(length) = length.checked_sub(HEAD) else {
            return Err(Error::invalid(format!("pages in a frame of {length} bytes")));
        };
        let mut head = [0; HEAD];
        self.from.read_exact(&mut head).map_err(Error::read)?;
        let pages = Pages::from_head(&head, length)?;
        Ok(Message::Pages(Pages { payload: self.payload("Pages", length)?, ..pages }))
    }

    fn image(&mut self, length: usize) -> Result<Message> {
        let Some(length) = length.checked_sub(2) else {
            return Err(Error::invalid(format!("an image in a frame of {length} bytes")));
        };
        let mut head = [0; 2];
        self.from.read_exact(&mut head).map_err(Error::read)?;
        let [more, name] = head;
        let (more, name) = (more, usize::from(name));
        if more > 1 || name == 0 || name > length.min(MAX_NAME) {
            return Err(Error::invalid(format!("an image with a name of {name} bytes in a frame of {length} bytes")));
        }
        let mut text = vec![0; name];
        self.from.read_exact(&mut text).map_err(Error::read)?;
        let name = String::from_utf8(text).map_err(|_| Error::invalid("an image whose name is no text"))?;
        if name.contains(['/', '\0']) || name == "." || name == ".." {
            return Err(Error::invalid(format!("an image that calls itself {name:?}")));
        }
        let bytes = self.payload("Image", length - name.len())?;
        Ok(Message::Image(Image { name, more: more == 1, bytes }))
    }

    fn payload(&mut self, what: &'static str, length: usize) -> Result<Vec<u8>> {
        self.bytes(what, length, MAX_PAYLOAD)
    }

    fn bytes(&mut self, what: &'static str, length: usize, limit: usize) -> Result<Vec<u8>> {
        if length > limit {
            return Err(Error::TooLong { what, length: length as u64, limit: limit as u64 });
        }
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.resize(length, 0);
        self.from.read_exact(&mut bytes).map_err(Error::read)?;
        Ok(bytes)
    }
}
