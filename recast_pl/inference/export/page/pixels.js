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
    const values = Array.from({length: last - first}, (_, k) => cubic((first + k - centre + 0.5) / wide));
    const sum = values.reduce((a, b) => a + b, 0);
    return [first, values.map(value => value / sum)];
  });
}

const round = value => Math.min(255, Math.max(0, Math.floor(value + 0.5)));

// An ImageData as numbers in [0, 1], channel after channel (3 * height * width).
function pixels(image, height, width) {
  const share = Math.min(image.width / width, image.height / height);
  const [cutX, cutY] = [share * width, share * height];
  const [left, top] = [(image.width - cutX) / 2, (image.height - cutY) / 2];
  const across = weights(image.width, left, left + cutX, width), down = weights(image.height, top, top + cutY, height);
  const rows = new Uint8ClampedArray(3 * image.height * width), result = new Float32Array(3 * height * width);
  for (let channel = 0; channel < 3; channel++) {
    for (let y = 0; y < image.height; y++)
      across.forEach(([first, values], x) => {
        let sum = 0, place = 4 * (y * image.width + first) + channel;
        for (const value of values) { sum += value * image.data[place]; place += 4; }
        rows[(channel * image.height + y) * width + x] = round(sum);
      });
    down.forEach(([first, values], y) => {
      for (let x = 0; x < width; x++) {
        let sum = 0, place = (channel * image.height + first) * width + x;
        for (const value of values) { sum += value * rows[place]; place += width; }
        result[(channel * height + y) * width + x] = round(sum) / 255;
      }
    });
  }
  return result;
}
