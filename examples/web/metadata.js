// The metadata of an ONNX file. onnxruntime-web does not give it out, but it is easy to find: the file is a protobuf
// message, a row of fields, each with its number and its length. Field 14 is a key and its value; the graph is skipped.

const METADATA = 14;
const VARINT = 0;
const FIXED64 = 1;
const BYTES = 2;
const FIXED32 = 5;

function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let factor = 1; ; factor *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * factor;
      if (!(byte & 128)) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const number = Math.floor(tag / 8);
    const type = tag % 8;
    if (type === VARINT) {
      varint();
    } else if (type === BYTES) {
      const length = varint();
      yield [number, bytes.subarray(at, at + length)];
      at += length;
    } else if (type === FIXED64 || type === FIXED32) {
      at += type === FIXED64 ? 8 : 4;
    } else {
      return; // no protobuf message
    }
  }
}

export function readMetadata(bytes) {
  const text = new TextDecoder();
  const metadata = {};
  for (const [number, entry] of fields(bytes)) {
    if (number !== METADATA) continue;
    const { 1: key, 2: value } = Object.fromEntries([...fields(entry)].map(([n, part]) => [n, text.decode(part)]));
    metadata[key] = value ?? "";
  }
  return metadata;
}
