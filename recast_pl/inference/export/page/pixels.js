"use strict";
// Images as the network was trained on them: the largest centred part of the wanted shape, resized by a bicubic filter
// that is as wide as the pixels of the result (antialiased), and rounded to 8 bits after each of two passes, as in
// Pillow. Canvases resize in other ways, which browsers choose.

function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

// For each place of the result the first place that it reads, and the weights of those from there on.
function weights(size, start, end, wanted) {
  const scale = (end - start) / wanted, wide = Math.max(scale, 1);
  return Array.from({length: wanted}, (_, place) => {
    const centre = start + (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - 2 * wide + 0.5)), last = Math.min(size, Math.trunc(centre + 2 * wide + 0.5));
    const values = Float64Array.from({length: last - first}, (_, k) => cubic((first + k - centre + 0.5) / wide));
    const sum = values.reduce((a, b) => a + b, 0);
    return {first, values: values.map(value => value / sum)};
  });
}

const round = value => Math.min(255, Math.max(0, Math.floor(value + 0.5)));

// The first pass, over columns: 8-bit numbers (image.height, wanted, 3).
function narrow({data, height, width}, across) {
  const rows = new Uint8Array(3 * height * across.length);
  let result = 0;
  for (let y = 0; y < height; y++)
    for (const {first, values} of across) {
      let red = 0, green = 0, blue = 0;
      for (let k = 0, place = 4 * (y * width + first); k < values.length; k++, place += 4) {
        red += values[k] * data[place];
        green += values[k] * data[place + 1];
        blue += values[k] * data[place + 2];
      }
      rows[result++] = round(red);
      rows[result++] = round(green);
      rows[result++] = round(blue);
    }
  return rows;
}

// An ImageData as numbers in [0, 1], channel after channel (3 * height * width).
function pixels(image, height, width) {
  const share = Math.min(image.width / width, image.height / height);
  const [cutX, cutY] = [share * width, share * height];
  const [left, top] = [(image.width - cutX) / 2, (image.height - cutY) / 2];
  const rows = narrow(image, weights(image.width, left, left + cutX, width)), result = new Float32Array(3 * height * width);
  weights(image.height, top, top + cutY, height).forEach(({first, values}, y) => {
    for (let i = 0; i < 3 * width; i++) {
      let sum = 0;
      for (let k = 0; k < values.length; k++) sum += values[k] * rows[3 * width * (first + k) + i];
      result[(i % 3 * height + y) * width + (i - i % 3) / 3] = round(sum) / 255;
    }
  });
  return result;
}
