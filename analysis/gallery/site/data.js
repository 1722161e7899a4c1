"use strict";
// Data are script files, since a page of the file system may not fetch. Each calls receive(name, text) when it runs;
// analysis/gallery/pack.py says what the text is.

const waiting = new Map();
const loaded = new Map();

function receive(name, text) {
  waiting.get(name)(text);
  waiting.delete(name);
}

/** The content of data/<name>.js: its JSON, and a typed array for each column. */
function load(name) {
  if (!loaded.has(name)) {
    const text = new Promise((resolve, reject) => {
      waiting.set(name, resolve);
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onload = () => script.remove();
      script.onerror = () => reject(new Error(`data/${name}.js cannot be read; write the gallery again`));
      document.head.append(script);
    });
    loaded.set(name, text.then(unpack));
  }
  return loaded.get(name);
}

const ARRAYS = {
  u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i2: Int16Array, i4: Int32Array, f2: Uint16Array, f4: Float32Array,
};

async function unpack(text) {
  const characters = atob(text), bytes = new Uint8Array(characters.length);
  for (let place = 0; place < bytes.length; place++) bytes[place] = characters.charCodeAt(place);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  for (const [name, place] of Object.entries(header.columns)) {
    const size = place.shape.reduce((product, count) => product * count, 1);
    const raw = new ARRAYS[place.type](buffer, 4 + length + place.at, size);
    const values = place.type === "f2" ? halves(raw) : raw;
    const width = place.shape.slice(1).reduce((product, count) => product * count, 1);
    header[name] = { values, shape: place.shape, row: (number) => values.subarray(number * width, (number + 1) * width) };
  }
  return header;
}

/** The numbers that half-precision floats of 16 bits stand for. */
function halves(raw) {
  const values = new Float32Array(raw.length);
  for (let place = 0; place < raw.length; place++) {
    const sign = raw[place] & 0x8000 ? -1 : 1, exponent = (raw[place] >> 10) & 31, fraction = raw[place] & 1023;
    if (exponent === 31) values[place] = fraction ? NaN : sign * Infinity;
    else values[place] = sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : (2 ** -14 * fraction) / 1024);
  }
  return values;
}
