// The convolution kernels that every ISA provides. Everything here is fp32 and channels-last.
#pragma once

#include <cstdint>

namespace fastconv::cpu {

// Channels are packed in blocks of this many floats (a cache line), so that neighbouring pixels of a packed band are at
// a distance known at compile time.
constexpr int64_t kBlock = 16;
// Channels of the input of a first layer, at most.
constexpr int64_t kFewChannels = 4;

// What is done to a finished sum before it is stored: y = clamp(sum + bias + residual, low, high).
struct Epilogue {
  const float* bias = nullptr;      // [K]
  const float* residual = nullptr;  // shaped like y
  float low = -__builtin_inff(), high = __builtin_inff();
};

// Where the sums of a register tile go: rows x pixels outputs of some channels.
struct TileOutput {
  float* y;                          // first pixel, first channel of the tile
  const float* residual;             // the same place of the residual, or null
  const float* bias;                 // first channel, or null
  int64_t row_stride, pixel_stride;  // of y and residual
  int64_t channels;                  // channels to store, <= tile_k
  float low, high;
  bool streaming;  // non-temporal stores; y and pixel_stride aligned to a vector
};

// One register tile of a direct convolution: rows x pixels outputs of tile_k channels.
struct DirectTile : TileOutput {
  struct Tap {
    const float* x[2];  // packed input under this tap for the tile's first pixel, of each row
    int64_t index;      // which of the panel's taps it is
  };
  const Tap* taps;
  int64_t tap_count;
  int64_t x_offset;       // of the tile within its rows, added to every x
  int64_t panel_taps;     // taps in the weight panel, of which tap_count meet the image
  int64_t blocks;         // channel blocks
  int64_t block_stride;   // between channel blocks of x
  int64_t last_channels;  // channels in the last block
  const float* w;         // panel [block][tap][channel][vectors * lanes]
  const float* next;      // wanted next: one vector * lanes of it is prefetched a step
  bool accumulate;        // the sums go on from those in y, whose channels are then whole vectors
  const float* later;     // wanted later: a cache line of it is fetched into L2 a step; null: none
  int64_t later_step;     // between those lines
};
using DirectTileFunction = void (*)(const DirectTile&);

// Weight gradient of one tap: acc[c][0..width) = sum over pixels of x[pixel][c] dy[pixel][0..width), c < kBlock; or
// added to that.
struct WeightTile {
  struct Row {
    int64_t x, dy;  // offsets of its first pixel
  };
  const float* x;   // one channel block of a packed band
  const float* dy;  // packed: [pixel][width]
  const Row* row;
  int64_t rows, columns;       // pixels
  int64_t width;               // lanes or 2 * lanes
  int64_t channels;            // channels wanted, <= kBlock
  const float* next;           // wanted next: a cache line of it is prefetched for each pixel
  int64_t next_step = kBlock;  // between those lines
  const float* later;          // wanted later: a cache line of it, too; null: none
  int64_t later_step;          // between those lines
  float* acc;                  // [kBlock][width]
  bool add = true;             // to the sums in acc
};

// A tile of outputs, each of which reads one run ("strip") of floats in each of several rows:
// y[p] = sum over r < rows, j < taps of x[r * x_row_step + p * x_step + j] w[r][j]
struct StripTile : TileOutput {
  const float* x;
  int64_t x_step, x_row_step;
  int64_t rows, taps;
  const float* w;       // [rows][taps][vectors * lanes]
  const float* next_w;  // weights wanted next: kBlock floats of them are prefetched a tap; or null
  const float* next;    // pixels next_step apart, as many as the tile's, which are fetched into L2; null: none
  int64_t next_step;
};
using StripTileFunction = void (*)(const StripTile&);

// Few vectors times a matrix in place: y[r][o] = clamp(sum over i of x[r][i] w[o][i] + bias[o] + residual[r][o])
struct DotTile {
  const float* x;
  const float* w;
  int64_t x_step, w_step;  // between rows
  int64_t rows, length;    // rows <= dot_rows
  int64_t outs;
  const float* bias;      // or null
  const float* residual;  // like y, or null
  float* y;
  int64_t y_step;
  float low, high;
};

// The gradient of a strip's weights, one vector of lanes or two:
// acc[r][j][lane] += sum over pixels of a[pixel + r * a_tap_step + j] b[pixel + lane]
struct StripWeightTile {
  const float* a;
  int64_t a_step, a_row_step, a_tap_step;  // between pixels of a row; rows of pixels; rows r
  const float* b;
  int64_t b_step, b_row_step;  // between pixels of a row; rows of pixels
  int64_t rows, columns;       // pixels
  int64_t tap_rows, taps;      // r < tap_rows, j < taps
  float* acc;
  int64_t acc_step;   // from one j to the next: the lanes of one vector or of two; those of r follow each other
  const float* next;  // wanted next: a cache line of it is fetched into L2 for each pixel
  int64_t next_step, next_row_step;
};

// Outputs along a row of planes: y[c][p] = sum over planes k and taps of x[k * x_step + tap.x + p] w[k][tap.w + c]
struct PlanarTile {
  struct Tap {
    int64_t x, w;
  };
  const Tap* taps;
  int64_t tap_count;
  const float* x;
  int64_t x_step, planes;
  const float* w;
  int64_t w_step;     // between planes
  int64_t channels;   // <= kFewChannels
  int64_t vectors;    // of outputs, <= planar_vectors[channels - 1]
  const float* next;  // wanted next: as many floats as the tile reads under one tap are fetched into L2
  float* y;
  int64_t y_step;  // between channels
};

// What the kernels of a depthwise convolution have loops for; any other kernel is given to them as one of a single
// column, whose rows are the taps.
constexpr int64_t kMaxDepthwiseColumns = 5, kMaxDepthwiseStep = 2;

// A stream that is fetched on while a kernel works on what came before: from where, and how much for a vector of one
// output.
struct Prefetch {
  const float* at;
  int64_t floats;
};

// One or two rows of outputs of a depthwise convolution: under every channel, of row r
// y[r][j] = sum over (a, b) of w[a][b] x_rows[a + r * row_step][j * step + b].
struct DepthwiseRows {
  const float* const* const* x_rows;  // pointers to pixels; null: a row outside the image
  int64_t x_row_count, row_step;      // with one row of outputs row_step = x_row_count
  int64_t kernel_rows, kernel_columns, step;
  const float* w;  // [channels / lanes, rounded up][kernel_rows][kernel_columns][lanes], zero in the tail
  float* y;
  const float* residual;  // like y, or null
  const float* bias;      // or null
  int64_t rows, outputs;
  int64_t y_row, y_pixel;  // floats between rows and between neighbouring outputs
  int64_t channels;
  float low, high;
  bool streaming;    // non-temporal stores of full vectors; y, y_row and y_pixel aligned
  Prefetch next[1];  // of x
};

// dw[a][b] += sum over (r, j) of dy[r][j] x_rows[a + r * row_step][j * step + b].
struct DepthwiseWeightRows {
  const float* const* const* x_rows;
  int64_t x_row_count, row_step;
  int64_t kernel_rows, kernel_columns, step;
  float* w;  // dw, laid out as w
  const float* dy;
  int64_t outputs;
  int64_t dy_row, dy_pixel;  // dy_row = 0 with one row of outputs
  int64_t channels;
  Prefetch next[2];  // of x and dy
};

// y[r][i] (+)= sum over k < depth of a[r * a_row_step + k * a_step] b[k * b_step + i], i < length
struct OuterTile {
  const float* a;
  const float* b;
  const float* b_next;  // rows like those of b that the next call reads, or null
  float* y;
  int64_t a_row_step, a_step, b_step, y_step;
  int64_t rows, depth, length;
  bool accumulate;  // add to y
  bool streaming;   // non-temporal stores; y and y_step aligned to a line
};

// Groups whose channels share a vector: index[i][lane] is the lane of channel i of the group that `lane` belongs to.
constexpr int64_t kGroupedTaps = 3;  // neighbouring taps of a kernel row that are taken together, at most

// One register tile: y[pixel][lane] = sum over runs, taps s and i < group of x[pixel + s][channel i of the lane's
// group]
// * w[s][i][lane]. Pixels of x are kBlock floats apart.
struct GroupedTile : TileOutput {
  struct Run {
    const float *x, *w;
    int64_t taps;
  };
  const Run* runs;
  int64_t run_count;
  int64_t x_offset;      // of the tile within its row, added to every x
  int64_t group;         // channels
  const int32_t* index;  // [group][lanes]
};
using GroupedTileFunction = void (*)(const GroupedTile&);

// The gradient of the weights of one run: acc[s][i][lane] += sum over pixels of x[pixel + s] dy[pixel][lane], where x
// is channel i of the lane's group.
struct GroupedWeightTile {
  const float* x;
  const int64_t* row_offsets;  // of x, one an output row
  int64_t taps, group;
  const int32_t* index;   // [group][lanes]
  int64_t rows, columns;  // output pixels of the band
  const float* dy;        // [rows * columns][lanes], packed
  float* acc;
};

struct Conv2dKernels {
  int64_t lanes;
  int64_t tile_pixels;  // pixels of a direct tile: rows * pixels <= tile_pixels
  int64_t tile_k;       // channels of a direct tile
  // [vectors - 1][rows - 1][pixels - 1]; null beyond tile_pixels
  DirectTileFunction direct[2][2][16];
  StripTileFunction strip[2][16];  // [vectors - 1][pixels - 1]; null beyond tile_pixels
  int64_t dot_rows;
  void (*dot)(const DotTile&);
  // dst[block * block_stride + p * kBlock + i] = src[p * src_step + block * kBlock + i], zero beyond channels
  void (*pack_pixels)(const float* src, int64_t src_step, int64_t pixels, int64_t channels, float* dst,
                      int64_t block_stride);
  // The same of whole blocks of tile_k floats: dst[panel * panel_stride + p * tile_k + i]
  void (*pack_panels)(const float* src, int64_t src_step, int64_t pixels, int64_t panels, float* dst,
                      int64_t panel_stride);
  // dst[p * width + i] = src[p * src_step + i] for i < valid, zero up to width
  void (*pack_slice)(const float* src, int64_t src_step, int64_t pixels, int64_t valid, int64_t width, float* dst);
  // dst[p * step + i] = 0 for i < channels
  void (*zero_pixels)(float* dst, int64_t step, int64_t pixels, int64_t channels, bool streaming);
  // One block of a weight panel: dst[i * width + o] = src[o * out_step + i * in_step], o < outs, i < ins; zero for
  // outs <= o < width
  void (*pack_weights)(const float* src, int64_t out_step, int64_t in_step, int64_t outs, int64_t ins, int64_t width,
                       float* dst);
  // The way back: dst[o * out_step + i * in_step] = src[i * width + o]
  // streaming: around the caches if in_step = 1; dst and out_step are then whole cache lines
  void (*unpack_weights)(const float* src, int64_t width, int64_t outs, int64_t ins, float* dst, int64_t out_step,
                         int64_t in_step, bool streaming);
  // The same of taps that lie side by side: dst[places[t] + i * width + o] = src[o * out_step + i * in_step + t]
  void (*pack_taps)(const float* src, int64_t out_step, int64_t in_step, int64_t taps, int64_t outs, int64_t ins,
                    int64_t width, const int64_t* places, float* dst);
  // The way back: dst[o * out_step + i * in_step + t] = src[places[t] + i * width + o]
  void (*unpack_taps)(const float* src, int64_t width, const int64_t* places, int64_t taps, int64_t outs, int64_t ins,
                      float* dst, int64_t out_step, int64_t in_step);
  // The same around the caches: the taps of all inputs lie side by side, each output's are whole cache lines
  void (*stream_taps)(const float* src, int64_t width, const int64_t* places, int64_t taps, int64_t outs, int64_t ins,
                      float* dst, int64_t out_step);
  void (*weight_tile)(const WeightTile&);
  int64_t strip_sums;  // taps of a weight gradient whose sums, of one vector, fit the registers
  void (*strip_weight_tile)(const StripWeightTile&);
  GroupedTileFunction grouped_tile[16];  // [pixels - 1]; null beyond tile_pixels
  void (*grouped_weight_tile)(const GroupedWeightTile&);
  int64_t planar_vectors[kFewChannels];
  void (*planar_tile)(const PlanarTile&);
  void (*depthwise_rows)(const DepthwiseRows&);
  void (*depthwise_weight_rows)(const DepthwiseWeightRows&);
  void (*outer)(const OuterTile&);
};

}  // namespace fastconv::cpu
